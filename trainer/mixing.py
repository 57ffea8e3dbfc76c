"""What is done to a batch of normalised images, and to their labels, before a classifier sees them: random erasing, mixup
and CutMix. Pure functions of (seed, epoch, sample id), drawn on the host, done on the device.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pipeline.hashing import uniform
from trainer.hashing import normal

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
ERASE_STREAM, NOISE_STREAM, MIX_STREAM = 41, 42, 43
ERASED_AREA = (0.02, 1 / 3)  # of the image (timm's RandomErasing)
ERASED_RATIO = (0.3, 1 / 0.3)  # height over width
TRIES = 10


def erased_boxes(
    probability: float, seed: int, epoch: int, sample_ids: Ints, height: int, width: int
) -> Ints:
    """The box (y, x, h, w) to be erased of each image: int64[n, 4], empty where nothing is.

    Zhong et al. 2017, arXiv 1708.04896, algorithm 1, with timm's numbers.
    """
    tries = np.arange(TRIES)[None, :]
    draw = [uniform(seed, ERASE_STREAM, epoch, sample_ids[:, None], tries, k) for k in range(4)]
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * draw[0])
    low, high = math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])
    ratio = np.exp(low + (high - low) * draw[1])
    h, w = (np.rint(np.sqrt(side)).astype(np.int64) for side in (area * ratio, area / ratio))
    fits = (h < height) & (w < width)
    y = (draw[2] * (height - h + 1)).astype(np.int64)
    x = (draw[3] * (width - w + 1)).astype(np.int64)
    first = np.argmax(fits, axis=1)
    boxes = np.stack([y, x, h, w], axis=-1)[np.arange(len(first)), first]
    wanted = uniform(seed, ERASE_STREAM, epoch, sample_ids, TRIES) < probability
    return boxes * (fits.any(axis=1) & wanted)[:, None]


def erase(images: torch.Tensor, probability: float, seed: int, epoch: int, sample_ids: Ints) -> torch.Tensor:
    """Of float[n, 3, h, w], a box of some images becomes noise, N(0, 1) for each pixel and channel."""
    channels, height, width = images.shape[1:]
    boxes = erased_boxes(probability, seed, epoch, sample_ids, height, width)
    rows = np.flatnonzero(boxes[:, 2])
    if not len(rows):
        return images
    index = torch.from_numpy(rows).to(images.device, non_blocking=True)
    ids = torch.from_numpy(sample_ids[rows]).to(images.device, non_blocking=True)
    pixel = torch.arange(channels * height * width, device=images.device)
    noise = normal(seed, NOISE_STREAM, epoch, ids[:, None], pixel).view(-1, channels, height, width)
    inside = inside_boxes(boxes[rows], height, width, images.device)
    images = images.clone()
    images[index] = torch.where(inside, noise.to(images), images[index])
    return images


def inside_boxes(boxes: Ints, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Which pixels lie in the box (y, x, h, w) of each image: bool[n, 1, height, width]."""
    y, x, h, w = (
        side[:, None, None, None]
        for side in torch.from_numpy(boxes).to(device, non_blocking=True).unbind(dim=1)
    )
    row = torch.arange(height, device=device).view(1, 1, -1, 1)
    column = torch.arange(width, device=device).view(1, 1, 1, -1)
    return (row >= y) & (row < y + h) & (column >= x) & (column < x + w)


def partners(weights: npt.NDArray[np.float32], per_lane: int) -> Ints:
    """Whom each image is mixed with: the next one of what a step takes of its lane, and the last one with the first, so that
    it is the same at any world size. int64[n]; itself where that one is bad.

    Args:
        weights: float[n] of a local batch, lane after lane: 0 for what is bad.
        per_lane: samples of a lane, B / V.
    """
    there = np.arange(len(weights)).reshape(-1, per_lane)
    with_whom = np.roll(there, -1, axis=1).ravel()
    return np.where(weights[with_whom] > 0, with_whom, there.ravel())


def mixing_plan(
    mixup: float, cutmix: float, seed: int, epoch: int, sample_ids: Ints, height: int, width: int
) -> tuple[Floats, Ints]:
    """How each image is mixed: the share of itself that it keeps, float[n], and the box (y, x, h, w) of its partner that it
    is given, int64[n, 4], empty for mixup.

    Half of them by either, if both are wanted. Zhang et al. 2017, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899.

    Args:
        mixup, cutmix: the α of the Beta(α, α) from which shares are drawn; 0: not.
    """
    from scipy.special import betaincinv  # half a second, which no start of pre-training should wait for

    draw = [uniform(seed, MIX_STREAM, epoch, sample_ids, k) for k in range(4)]
    cut = np.full(len(sample_ids), bool(cutmix)) & ((draw[0] < 0.5) | (not mixup))
    kept = np.ones(len(sample_ids))
    for alpha, those in ((mixup, ~cut), (cutmix, cut)):
        if alpha:
            kept[those] = betaincinv(alpha, alpha, draw[1][those])
    # The box has a centre anywhere in the image, and what lies outside is cut off.
    side = np.sqrt(1 - kept)
    h, w = (height * side).astype(np.int64), (width * side).astype(np.int64)
    y, x = (draw[2] * height).astype(np.int64), (draw[3] * width).astype(np.int64)
    top, bottom = np.clip(y - h // 2, 0, height), np.clip(y + h // 2, 0, height)
    left, right = np.clip(x - w // 2, 0, width), np.clip(x + w // 2, 0, width)
    boxes = np.stack([top, left, bottom - top, right - left], axis=-1) * cut[:, None]
    given = boxes[:, 2] * boxes[:, 3] / (height * width)
    return np.where(cut, 1 - given, kept), boxes


def mix(
    images: torch.Tensor, targets: torch.Tensor, whom: Ints, kept: Floats, boxes: Ints
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float[n, 3, h, w] and targets float[n, classes], each mixed with its partner's by a `mixing_plan`."""
    device, (height, width) = images.device, images.shape[2:]
    other = torch.from_numpy(whom).to(device, non_blocking=True)
    share = torch.from_numpy(kept).to(device, images.dtype, non_blocking=True)
    cut = torch.from_numpy(boxes[:, 2] > 0).to(device, non_blocking=True)[:, None, None, None]
    inside = inside_boxes(boxes, height, width, device)
    blended = torch.lerp(images[other], images, share[:, None, None, None])
    mixed = torch.where(cut, torch.where(inside, images[other], images), blended)
    return mixed, torch.lerp(targets[other], targets, share[:, None].to(targets.dtype))


def smooth_targets(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """Labels int[n] → float[n, classes]: 1 − smoothing on the label, and smoothing / classes on all (Szegedy et al. 2015,
    arXiv 1512.00567, section 7)."""
    return F.one_hot(labels.long(), classes).float() * (1 - smoothing) + smoothing / classes
