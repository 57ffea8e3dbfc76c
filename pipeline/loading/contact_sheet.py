"""A contact sheet: a picture of samples from all over a dataset."""

import io

import numpy as np
from PIL import Image, ImageDraw

from pipeline.dataset.dataset import Dataset
from pipeline.decode.factory import make_decoder
from pipeline.loading.loader import centred_batch

COLUMNS, ROWS = 8, 6
TILE, CAPTION = 112, 14  # height of a sample and of its caption, pixels


def draw_contact_sheet(dataset: Dataset) -> bytes:
    """A PNG file with up to COLUMNS · ROWS samples, evenly spread over the dataset, each with its class name or key."""
    ids = np.unique(
        np.linspace(0, dataset.samples - 1, min(COLUMNS * ROWS, dataset.samples)).astype(np.int64)
    )
    decoder = make_decoder("cpu", TILE, threads=8)
    batch = centred_batch(dataset, decoder, ids)
    decoder.close()
    names = dataset.manifest.classes
    captions = [
        names[label] if label >= 0 else key
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
