"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) and colour jitter for a batch on its device.

The operations and their strengths are those of timm's `rand-m9-mstd0.5-inc1`, with which MAE and most ViTs are fine-tuned:
two of fifteen operations per image, each applied with probability one half; the magnitude is drawn from a normal distribution,
and the strength grows with it. All draws are pure functions of (seed, epoch, sample id) on the host, so the host never
waits for the device.
"""

import math
from collections.abc import Callable

import kornia.enhance as enhance
import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtri

from pipeline.arrays import Ints
from pipeline.hashing import uniform

RANDAUGMENT_STREAM, JITTER_STREAM = 31, 32  # streams of the hash, so that each use gets unrelated numbers
# The numbers of timm's auto_augment.py.
LAYERS, PROBABILITY = 2, 0.5  # operations per image, and the probability of each being applied
MAX_MAGNITUDE = 10
# Strengths at MAX_MAGNITUDE:
MAX_DEGREES, MAX_SHEAR, MAX_SHIFT = 30.0, 0.3, 0.45  # the shift is a share of the side
MAX_CHANGE, MIN_FACTOR = (
    0.9,
    0.1,
)  # factors of colour, contrast, brightness and sharpness: 1 ± 0.9, but at least 0.1
MAX_ADDED, ADD_BELOW = 110, 128  # solarize_add, of 255: the value added, and the pixels that it is added to
# (images float[n, 3, h, w] in [0, 1], level float[n] in [0, 1], sign float[n] of ±1, fill float[3]) → images
Operation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def randaugment(
    images: torch.Tensor,
    fill: torch.Tensor,
    seed: int,
    epoch: int,
    sample_ids: Ints,
    magnitude: float = 9.0,
    std: float = 0.5,
) -> torch.Tensor:
    """Apply RandAugment, independently to each image.

    Args:
        images: float[n, 3, h, w] in [0, 1].
        fill: float[3] in [0, 1], the colour of pixels that rotation, shear or translation bring in from outside.
        sample_ids: int64[n], on the host.
        magnitude: mean magnitude, 0 to 10.
        std: standard deviation of the magnitude.

    Returns float[n, 3, h, w] in [0, 1].
    """
    names = list(OPERATIONS)
    for layer in range(LAYERS):
        draws = [uniform(seed, RANDAUGMENT_STREAM, epoch, sample_ids, layer, k) for k in range(4)]
        chosen = (draws[0] * len(names)).astype(np.int64)
        applied = draws[1] < PROBABILITY
        magnitudes = magnitude + std * ndtri(
            np.maximum(draws[2], 1e-9)
        )  # ndtri: the normal distribution's quantiles
        levels = np.clip(magnitudes, 0, MAX_MAGNITUDE) / MAX_MAGNITUDE
        signs = np.where(draws[3] < 0.5, -1.0, 1.0)
        changed = images.clone()
        for number, name in enumerate(names):
            rows = np.flatnonzero((chosen == number) & applied)
            if len(rows):
                index, level, sign = (
                    torch.from_numpy(values).to(images.device, non_blocking=True)
                    for values in (rows, levels[rows], signs[rows])
                )
                operation = OPERATIONS[name]
                changed[index] = operation(images[index], level.to(images), sign.to(images), fill)
        images = changed
    return images


def colour_jitter(
    images: torch.Tensor, strength: float, seed: int, epoch: int, sample_ids: Ints
) -> torch.Tensor:
    """Scale brightness, contrast and saturation of each image by independent factors.

    Args:
        images: uint8[n, 3, h, w].
        strength: factors are uniform in [1 − strength, 1 + strength].
        sample_ids: int64[n], on the host.

    Returns uint8[n, 3, h, w].
    """
    changed = images.float() / 255
    for k, adjust in enumerate(
        (
            enhance.adjust_brightness_accumulative,
            enhance.adjust_contrast_with_mean_subtraction,
            enhance.adjust_saturation_with_gray_subtraction,
        )
    ):
        factor = 1 + strength * (2 * uniform(seed, JITTER_STREAM, epoch, sample_ids, k) - 1)
        changed = adjust(changed, torch.from_numpy(factor).to(changed, non_blocking=True))
    return (changed * 255).round().to(torch.uint8)


def _autocontrast(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """Stretch each channel to [0, 1]; a constant channel stays as it is."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def _posterize(x: torch.Tensor, level: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """Keep the high bits of each channel: 4 at level 0, none at level 1."""
    dropped = _per_image(4 + (level * 4).long())
    pixels = (x * 255).round().to(torch.int64)
    return ((pixels >> dropped << dropped) / 255).to(x)


def _solarize(x: torch.Tensor, level: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """Invert bright pixels: none at level 0, all at level 1."""
    threshold = 256 - (level * 256).floor()
    return torch.where(x * 255 + 0.5 >= _per_image(threshold), 1 - x, x)


def _solarize_add(x: torch.Tensor, level: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """Brighten dark pixels."""
    added = (level * MAX_ADDED).floor() / 255
    return torch.where(x * 255 + 0.5 < ADD_BELOW, (x + _per_image(added)).clamp(max=1), x)


def _factor(level: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    return (1 + sign * level * MAX_CHANGE).clamp(min=MIN_FACTOR)


def _affine(x: torch.Tensor, rows: tuple[tuple[torch.Tensor, ...], ...], fill: torch.Tensor) -> torch.Tensor:
    """Take each pixel (column, row) from (a · column + b · row + c, d · column + e · row + f), with bicubic interpolation.

    Args:
        x: [n, 3, h, w].
        rows: ((a, b, c), (d, e, f)), each float[n]; coordinates are pixels from the image's centre.
        fill: float[3], the colour outside of the image.
    """
    height, width = x.shape[2:]
    (a, b, c), (d, e, f) = rows
    # affine_grid's coordinates run from -1 to 1 on both axes.
    theta = torch.stack(
        [
            torch.stack([a, b * height / width, 2 * c / width], dim=1),
            torch.stack([d * width / height, e, 2 * f / height], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    outside = fill.to(x).view(1, 3, 1, 1)
    moved = F.grid_sample(x - outside, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (moved + outside).clamp(0, 1)


def _rotate(x: torch.Tensor, level: torch.Tensor, sign: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Rotate counter-clockwise for a positive sign."""
    angle = -sign * level * math.radians(MAX_DEGREES)
    zero = torch.zeros_like(angle)
    return _affine(x, ((angle.cos(), angle.sin(), zero), (-angle.sin(), angle.cos(), zero)), fill)


def _shear(axis: int) -> Operation:
    def shear(x: torch.Tensor, level: torch.Tensor, sign: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        """Shear about the image's top left corner, as Pillow does."""
        amount = sign * level * MAX_SHEAR
        one, zero = torch.ones_like(amount), torch.zeros_like(amount)
        height, width = x.shape[2:]
        if axis == 0:
            return _affine(x, ((one, amount, amount * height / 2), (zero, one, zero)), fill)
        return _affine(x, ((one, zero, zero), (amount, one, amount * width / 2)), fill)

    return shear


def _translate(axis: int) -> Operation:
    def translate(
        x: torch.Tensor, level: torch.Tensor, sign: torch.Tensor, fill: torch.Tensor
    ) -> torch.Tensor:
        shift = sign * level * MAX_SHIFT * x.shape[3 - axis]
        one, zero = torch.ones_like(shift), torch.zeros_like(shift)
        dx, dy = (shift, zero) if axis == 0 else (zero, shift)
        return _affine(x, ((one, zero, dx), (zero, one, dy)), fill)

    return translate


def _per_image(values: torch.Tensor) -> torch.Tensor:
    """[n] → [n, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


OPERATIONS: dict[str, Operation] = {
    "autocontrast": _autocontrast,
    "equalize": lambda x, *_: enhance.equalize(x),
    "invert": lambda x, *_: 1 - x,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": lambda x, level, sign, _: enhance.adjust_saturation_with_gray_subtraction(
        x, _factor(level, sign)
    ),
    "contrast": lambda x, level, sign, _: enhance.adjust_contrast_with_mean_subtraction(
        x, _factor(level, sign)
    ),
    "brightness": lambda x, level, sign, _: enhance.adjust_brightness_accumulative(x, _factor(level, sign)),
    "sharpness": lambda x, level, sign, _: enhance.sharpness(x, _factor(level, sign)),
    "shear_x": _shear(0),
    "shear_y": _shear(1),
    "translate_x": _translate(0),
    "translate_y": _translate(1),
}
