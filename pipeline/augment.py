"""Crop boxes and flips for a whole batch at once: pure functions of (seed, epoch, sample id, image size).

Every decoder is handed boxes, so every decoder produces the same crops.
"""

import math

import numpy as np
import numpy.typing as npt

from pipeline.hashing import hash64, uniform

Ints = npt.NDArray[np.int64]

# torchvision's RandomResizedCrop rule, with the paper's scale (He et al. 2021, appendix A.1).
SCALE = (0.2, 1.0)  # of the image's area
RATIO = (3 / 4, 4 / 3)  # width over height
TRIES = 10
CROP_STREAM, FLIP_STREAM = 11, 12


def random_resized_crops(seed: int, epoch: int, sample_ids: Ints, heights: Ints, widths: Ints) -> Ints:
    """A box (y, x, height, width) for each sample: int[n, 4], never empty, always inside the image.

    Ten tries of a random area and aspect ratio, the first that fits is taken; else the largest centred box
    whose ratio is within bounds.
    """
    tries = np.arange(TRIES)[None, :]
    draw = [
        uniform(seed, CROP_STREAM, epoch, sample_ids[:, None], tries, k) for k in range(4)
    ]  # each [n, tries]
    area = (heights * widths)[:, None] * (SCALE[0] + (SCALE[1] - SCALE[0]) * draw[0])
    log_ratio = (math.log(RATIO[0]), math.log(RATIO[1]))
    ratio = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * draw[1])
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    # Floor of a uniform over the number of places keeps both borders reachable, as randint does.
    y = (draw[2] * (heights[:, None] - h + 1)).astype(np.int64)
    x = (draw[3] * (widths[:, None] - w + 1)).astype(np.int64)
    first = np.argmax(fits, axis=1)
    tried = np.stack([y, x, h, w], -1)[np.arange(len(first)), first]
    return np.where(np.any(fits, axis=1)[:, None], tried, _centred_within_ratio(heights, widths))


def _centred_within_ratio(heights: Ints, widths: Ints) -> Ints:
    ratio = widths / heights
    h = np.where(ratio < RATIO[0], np.rint(widths / RATIO[0]).astype(np.int64), heights)
    w = np.where(ratio > RATIO[1], np.rint(heights * RATIO[1]).astype(np.int64), widths)
    h, w = np.clip(h, 1, heights), np.clip(w, 1, widths)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], -1)


def centre_crops(heights: Ints, widths: Ints) -> Ints:
    """The centred square of 224/256 of the shorter side, as (y, x, height, width): int[n, 4].

    The usual evaluation crop (shorter side to 256, centre 224), as a box on the original.
    """
    side = np.maximum(np.rint(np.minimum(heights, widths) * (224 / 256)).astype(np.int64), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], -1)


def random_flips(seed: int, epoch: int, sample_ids: Ints) -> npt.NDArray[np.bool_]:
    """Whether each sample is mirrored, with probability one half: bool[n]."""
    return (hash64(seed, FLIP_STREAM, epoch, sample_ids) >> np.uint64(63)).astype(bool)
