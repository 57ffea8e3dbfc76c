"""Crop boxes and flips for a whole batch: pure functions of (seed, epoch, sample id, image size).

Boxes are int64[n, 4], (y, x, height, width) in pixels of the stored image; sample ids, heights and widths are int64[n].
Decoders receive boxes, so every decoder produces the same crops.
"""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Ints
from pipeline.hashing import hash64, uniform

# torchvision's RandomResizedCrop rule (He et al. 2021, Table 8), with the scale of the authors' main_pretrain.py.
AREA = (0.2, 1.0)  # smallest and largest area of a random crop, as a share of the image's area
RATIO = (3 / 4, 4 / 3)  # smallest and largest width / height of a random crop
TRIES = 10
# Side of the evaluation crop as a share of the shorter side: resize the shorter side to 256, take the central 224.
CENTRE = 224 / 256
Crops = Literal["random", "fixed", "centre"]
CROP_STREAM, FLIP_STREAM = 11, 12


def random_resized_crops(
    seed: int,
    epoch: int,
    sample_ids: Ints,
    heights: Ints,
    widths: Ints,
    area: tuple[float, float] = AREA,
) -> Ints:
    """Boxes of random area, aspect ratio and position: int64[n, 4], never empty, always inside the image.

    Draws TRIES boxes per sample and takes the first that fits into the image; if none does, the largest centred box
    whose aspect ratio is within RATIO.

    Args:
        area: smallest and largest area, as a share of the image's.
    """
    tries = np.arange(TRIES)[None, :]
    draw = [
        uniform(seed, CROP_STREAM, epoch, sample_ids[:, None], tries, k) for k in range(4)
    ]  # each [n, tries]
    pixels = (heights * widths)[:, None] * (area[0] + (area[1] - area[0]) * draw[0])
    log_ratio = (math.log(RATIO[0]), math.log(RATIO[1]))
    ratio = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * draw[1])
    w = np.rint(np.sqrt(pixels * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(pixels / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    # Like randint: uniform over all positions, with both borders included.
    y = (draw[2] * (heights[:, None] - h + 1)).astype(np.int64)
    x = (draw[3] * (widths[:, None] - w + 1)).astype(np.int64)
    first = np.argmax(fits, axis=1)
    tried = np.stack([y, x, h, w], -1)[np.arange(len(first)), first]
    return np.where(np.any(fits, axis=1)[:, None], tried, _centred_within_ratio(heights, widths))


def _centred_within_ratio(heights: Ints, widths: Ints) -> Ints:
    """The largest centred boxes whose aspect ratio is within RATIO: int64[n, 4]."""
    ratio = widths / heights
    h = np.where(ratio < RATIO[0], np.rint(widths / RATIO[0]).astype(np.int64), heights)
    w = np.where(ratio > RATIO[1], np.rint(heights * RATIO[1]).astype(np.int64), widths)
    h, w = np.clip(h, 1, heights), np.clip(w, 1, widths)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], -1)


def centre_crops(heights: Ints, widths: Ints, share: float = CENTRE, aspect: float = 1.0) -> Ints:
    """Centred boxes: the largest of the given aspect ratio (width / height) that fits into the image, with both sides
    scaled by `share`: int64[n, 4]. For a square (aspect 1) that is `share` of the shorter side."""
    h = np.minimum(heights, widths / aspect) * share
    h, w = (np.maximum(np.rint(side).astype(np.int64), 1) for side in (h, h * aspect))
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], -1)


def fixed_crops(
    seed: int, epoch: int, sample_ids: Ints, heights: Ints, widths: Ints, aspect: float = 1.0
) -> Ints:
    """Boxes of the evaluation crop's size at a random position: int64[n, 4]."""
    h, w = centre_crops(heights, widths, CENTRE, aspect)[:, 2:].T
    y, x = (
        (uniform(seed, CROP_STREAM, epoch, sample_ids, TRIES, k) * (room + 1)).astype(np.int64)
        for k, room in enumerate((heights - h, widths - w))
    )
    return np.stack([y, x, h, w], -1)


def random_flips(seed: int, epoch: int, sample_ids: Ints) -> npt.NDArray[np.bool_]:
    """Whether to mirror each sample, with probability one half: bool[n]."""
    return (hash64(seed, FLIP_STREAM, epoch, sample_ids) >> np.uint64(63)).astype(bool)
