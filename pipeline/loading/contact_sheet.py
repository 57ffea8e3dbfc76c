"""A contact sheet: a picture of samples from all over a dataset."""

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import NO_LABEL, Manifest
from pipeline.decode.factory import make_decoder
from pipeline.loading.loader import centred_batch

COLUMNS, ROWS = 8, 6
TILE, CAPTION = 112, 14  # height of a sample and of its caption, pixels


def draw_contact_sheet(dataset: Dataset) -> bytes:
    """A PNG file with up to COLUMNS · ROWS samples, evenly spread over the dataset, each with its label or key."""
    ids = np.unique(
        np.linspace(0, dataset.samples - 1, min(COLUMNS * ROWS, dataset.samples)).astype(np.int64)
    )
    decoder = make_decoder("cpu", TILE, threads=8)
    batch = centred_batch(dataset, decoder, ids)
    decoder.close()
    captions = [
        _caption(label, dataset.manifest) or key
        for label, key in zip(batch.labels.tolist(), dataset.keys(ids), strict=True)
    ]
    rows = -(-len(ids) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 4) + 4, rows * (TILE + CAPTION + 4) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        left, top = 4 + i % COLUMNS * (TILE + 4), 4 + i // COLUMNS * (TILE + CAPTION + 4)
        sheet.paste(Image.fromarray(batch.images[i].permute(1, 2, 0).contiguous().numpy()), (left, top))
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
