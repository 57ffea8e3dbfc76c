"""Small datasets whose labels are several classes or numbers, which the colours of their images tell."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import LabelKind
from tests.support.data.foreign_tars import index, pack

SIDE = 24  # pixels
CHANNELS = 3  # classes, or numbers, of each image


def labelled_dataset(
    folder: Path, kind: LabelKind, samples: int = 60, seed: int = 0, missing: int = 0
) -> Dataset:
    """Images of one colour with noise, in two tars.

    Several classes: 0, 1 and 2, where red, green and blue are bright. Numbers: 1000 + 5 times each channel's brightness.

    Args:
        missing: samples without a label, at the end.
    """
    rng = np.random.default_rng(seed)
    files: list[dict[str, bytes]] = [{}, {}]
    for i in range(samples):
        bright = rng.integers(0, 2, CHANNELS)
        colour = 60 + 120 * bright if kind == "classes" else rng.integers(20, 220, CHANNELS)
        noise = rng.integers(0, 30, (SIDE, SIDE, CHANNELS))
        buffer = io.BytesIO()
        Image.fromarray((colour + noise).astype(np.uint8)).save(buffer, "PNG")
        several, numbers = np.flatnonzero(bright).tolist(), (1000.5 + 5.0 * colour).tolist()
        label = None if i >= samples - missing else several if kind == "classes" else numbers
        files[2 * i // samples] |= {
            f"{i:04d}.png": buffer.getvalue(),
            f"{i:04d}.json": json.dumps({"label": label}).encode(),
        }
    for part, content in enumerate(files):
        pack(folder / f"{part}.tar", content)
    index(folder, checksums=True)
    return open_dataset(str(folder))
