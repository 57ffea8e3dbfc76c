"""A contact sheet: what is in a dataset, at one look."""

import io

import numpy as np
from PIL import Image, ImageDraw

from pipeline.decode import make_decoder
from pipeline.loader import centred_batch
from pipeline.manifest import Dataset

TILE, COLUMNS, ROWS, CAPTION = 112, 8, 6, 14


def draw_contact_sheet(dataset: Dataset) -> bytes:
    """PNG of up to 48 samples spread evenly over the dataset, each with its class or key."""
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
