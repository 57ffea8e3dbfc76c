"""Random erasing, mixup, CutMix and label smoothing for a batch of normalised images.

Pure functions of (seed, epoch, sample id): drawn with numpy on the host, applied with torch on the device.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pipeline.arrays import Floats, Ints
from pipeline.hashing import uniform
from trainer.models.device_hashing import normal

# Streams of the hash, so that each use gets unrelated numbers.
ERASE_STREAM, NOISE_STREAM, MIX_STREAM = 41, 42, 43
ERASED_AREA = (0.02, 1 / 3)  # share of the image (timm's RandomErasing)
ERASED_ASPECT = (0.3, 1 / 0.3)  # height over width (timm's RandomErasing)
TRIES = 10  # timm's RandomErasing


def erase_boxes(probability: float, seed: int, epoch: int, sample_ids: Ints, height: int, width: int) -> Ints:
    """Draw the box to erase in each image (Zhong et al. 2017, arXiv 1708.04896, algorithm 1, with timm's numbers).

    Args:
        probability: of an image being erased.
        sample_ids: int64[n].
        height, width: of the images, in pixels.

    Returns int64[n, 4], boxes (y, x, height, width), all zeros where nothing is erased.
    """
    tries = np.arange(TRIES)[None, :]
    draws = [uniform(seed, ERASE_STREAM, epoch, sample_ids[:, None], tries, k) for k in range(4)]
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * draws[0])
    low, high = math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])
    aspect = np.exp(low + (high - low) * draws[1])
    h, w = (np.rint(np.sqrt(side)).astype(np.int64) for side in (area * aspect, area / aspect))
    fits = (h < height) & (w < width)
    y = (draws[2] * (height - h + 1)).astype(np.int64)
    x = (draws[3] * (width - w + 1)).astype(np.int64)
    first = np.argmax(fits, axis=1)
    boxes = np.stack([y, x, h, w], axis=-1)[np.arange(len(first)), first]
    erased = uniform(seed, ERASE_STREAM, epoch, sample_ids, TRIES) < probability
    return boxes * (fits.any(axis=1) & erased)[:, None]


def erase(images: torch.Tensor, probability: float, seed: int, epoch: int, sample_ids: Ints) -> torch.Tensor:
    """Replace a random box of some images by N(0, 1) noise per pixel and channel.

    Args:
        images: float[n, c, h, w], normalised.
        probability: of an image being erased.
        sample_ids: int64[n], on the host.

    Returns float[n, c, h, w]; `images` is not changed.
    """
    channels, height, width = images.shape[1:]
    boxes = erase_boxes(probability, seed, epoch, sample_ids, height, width)
    rows = np.flatnonzero(boxes[:, 2])
    if not len(rows):
        return images
    index = torch.from_numpy(rows).to(images.device, non_blocking=True)
    ids = torch.from_numpy(sample_ids[rows]).to(images.device, non_blocking=True)
    pixel = torch.arange(channels * height * width, device=images.device)
    noise = normal(seed, NOISE_STREAM, epoch, ids[:, None], pixel).view(-1, channels, height, width)
    inside = box_mask(boxes[rows], height, width, images.device)
    images = images.clone()
    images[index] = torch.where(inside, noise.to(images), images[index])
    return images


def box_mask(boxes: Ints, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return which pixels lie inside each image's box (y, x, height, width; int64[n, 4]): bool[n, 1, height, width]."""
    y, x, h, w = (
        side[:, None, None, None]
        for side in torch.from_numpy(boxes).to(device, non_blocking=True).unbind(dim=1)
    )
    row = torch.arange(height, device=device).view(1, 1, -1, 1)
    column = torch.arange(width, device=device).view(1, 1, 1, -1)
    return (row >= y) & (row < y + h) & (column >= x) & (column < x + w)


def mixing_partners(weights: npt.NDArray[np.float32], per_lane: int) -> Ints:
    """Choose the image that each image is mixed with: the next one of its lane in the same step, cyclically.

    Lanes are never split between workers, so partners are the same at any world size.

    Args:
        weights: float[n] of a local batch, lane after lane; 0 for a bad sample.
        per_lane: samples of a lane per step, B / V.

    Returns int64[n], rows of the batch; an image whose partner is bad is its own partner.
    """
    rows = np.arange(len(weights)).reshape(-1, per_lane)
    partners = np.roll(rows, -1, axis=1).ravel()
    return np.where(weights[partners] > 0, partners, rows.ravel())


def mixing_plan(
    mixup: float, cutmix: float, seed: int, epoch: int, sample_ids: Ints, height: int, width: int
) -> tuple[Floats, Ints]:
    """Draw how each image is mixed (mixup: Zhang et al. 2017, arXiv 1710.09412; CutMix: Yun et al. 2019, arXiv 1905.04899).

    With both turned on, each image gets either with probability one half.

    Args:
        mixup, cutmix: α of the distribution Beta(α, α) of an image's own share; 0 turns it off.
        sample_ids: int64[n].
        height, width: of the images, in pixels.

    Returns each image's own share, float64[n], and the box (y, x, height, width) that it takes from its partner under
    CutMix, int64[n, 4], all zeros under mixup.
    """
    from scipy.special import betaincinv  # imports in half a second, which pre-training should not pay

    draws = [uniform(seed, MIX_STREAM, epoch, sample_ids, k) for k in range(4)]
    uses_cutmix = np.full(len(sample_ids), bool(cutmix)) & ((draws[0] < 0.5) | (not mixup))
    shares = np.ones(len(sample_ids))
    for alpha, chosen in ((mixup, ~uses_cutmix), (cutmix, uses_cutmix)):
        if alpha:
            shares[chosen] = betaincinv(alpha, alpha, draws[1][chosen])
    # The box's centre is uniform over the image; what lies outside of the image is cut off, so the share is recomputed.
    side = np.sqrt(1 - shares)
    h, w = (height * side).astype(np.int64), (width * side).astype(np.int64)
    y, x = (draws[2] * height).astype(np.int64), (draws[3] * width).astype(np.int64)
    top, bottom = np.clip(y - h // 2, 0, height), np.clip(y + h // 2, 0, height)
    left, right = np.clip(x - w // 2, 0, width), np.clip(x + w // 2, 0, width)
    boxes = np.stack([top, left, bottom - top, right - left], axis=-1) * uses_cutmix[:, None]
    box_share = boxes[:, 2] * boxes[:, 3] / (height * width)
    return np.where(uses_cutmix, 1 - box_share, shares), boxes


def mix(
    images: torch.Tensor, targets: torch.Tensor, partners: Ints, shares: Floats, boxes: Ints
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix images and targets with those of their partners.

    Args:
        images: float[n, c, h, w].
        targets: float[n, classes].
        partners: int64[n], see `mixing_partners`.
        shares, boxes: see `mixing_plan`.

    Returns mixed images and targets of the same shapes.
    """
    device, (height, width) = images.device, images.shape[2:]
    other = torch.from_numpy(partners).to(device, non_blocking=True)
    share = torch.from_numpy(shares).to(device, images.dtype, non_blocking=True)
    uses_cutmix = torch.from_numpy(boxes[:, 2] > 0).to(device, non_blocking=True)[:, None, None, None]
    inside = box_mask(boxes, height, width, device)
    blended = torch.lerp(images[other], images, share[:, None, None, None])
    mixed = torch.where(uses_cutmix, torch.where(inside, images[other], images), blended)
    return mixed, torch.lerp(targets[other], targets, share[:, None].to(targets.dtype))


def smooth_targets(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """Smooth labels int[n] → float[n, classes]: 1 − smoothing on the label, plus smoothing / classes on all classes
    (Szegedy et al. 2015, arXiv 1512.00567, section 7)."""
    return F.one_hot(labels.long(), classes).float() * (1 - smoothing) + smoothing / classes
