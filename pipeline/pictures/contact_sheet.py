"""A contact sheet: a picture of samples from all over a dataset."""

import io
import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import NO_LABEL, Manifest
from pipeline.dataset.statistics import SCALES, read_statistics
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.images.pixels import RGB
from pipeline.loading.loader import centred_batch
from pipeline.pictures.bands import draw_bands, picture_bands

COLUMNS, ROWS = 8, 6
TILE, CAPTION = 112, 14  # height of a sample and of its caption, pixels


def _in_colours(dataset: Dataset, images: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """Draw bands of images that are not 8-bit RGB: pixels [n, c, h, w] → uint8[n, 3, h, w].

    Those of other than 8 bits are scaled by the dataset's mean and standard deviation, or by those of these images.
    """
    floats = images.double()
    bands = picture_bands(images.shape[1])
    if images.dtype == torch.uint8:
        return draw_bands(floats / 255, bands, None)
    try:
        found = read_statistics(dataset)
        scale = SCALES[found.dtype]
        contrast = torch.tensor(found.mean) * scale, torch.tensor(found.std) * scale
    except UserError:
        values = floats[good].movedim(1, 0).flatten(1)
        values = values[:, values.isfinite().all(dim=0)]
        contrast = values.mean(dim=1), values.std(dim=1)
    return draw_bands(floats, bands, contrast)


def draw_contact_sheet(dataset: Dataset) -> bytes:
    """A PNG file with up to COLUMNS · ROWS samples, evenly spread over the dataset, each with its label or key."""
    ids = np.unique(
        np.linspace(0, dataset.samples - 1, min(COLUMNS * ROWS, dataset.samples)).astype(np.int64)
    )
    pixels = dataset.manifest.pixels
    decoder = make_decoder("cpu", TILE, threads=8, pixels=pixels)
    batch = centred_batch(dataset, decoder, ids)
    decoder.close()
    images = batch.images
    if pixels != RGB:
        images = _in_colours(dataset, images, batch.weights > 0)
    captions = [
        _caption(label, dataset.manifest) or key
        for label, key in zip(batch.labels.tolist(), dataset.keys(ids), strict=True)
    ]
    rows = -(-len(ids) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 4) + 4, rows * (TILE + CAPTION + 4) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        left, top = 4 + i % COLUMNS * (TILE + 4), 4 + i // COLUMNS * (TILE + CAPTION + 4)
        sheet.paste(Image.fromarray(images[i].permute(1, 2, 0).contiguous().numpy()), (left, top))
        draw.text((left, top + TILE + 1), caption[-18:], fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _caption(label: int | list[float], manifest: Manifest) -> str:
    """The class names or the numbers of a label, as in `Dataset.labels`; "" without a label."""
    if isinstance(label, int):
        return manifest.classes[label] if label != NO_LABEL else ""
    if any(map(math.isnan, label)):
        return ""
    if manifest.labels == "numbers":
        return ", ".join(f"{number:.4g}" for number in label)
    return ", ".join(name for name, flag in zip(manifest.classes, label, strict=True) if flag)
