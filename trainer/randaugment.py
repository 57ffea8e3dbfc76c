"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) for a batch on its device, each image by itself.

The operations and their strengths are those of timm's `rand-m9-mstd0.5-inc1`, with which MAE and most ViTs are fine-tuned:
two of fifteen operations an image, each done with probability one half; the strength is drawn from a normal distribution
and grows with the magnitude. Which ones is a pure function of (seed, epoch, sample id), drawn on the host: a device is
never waited for.
"""

import math
from collections.abc import Callable

import kornia.enhance as enhance
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.special import ndtri

from pipeline.hashing import uniform

Ints = npt.NDArray[np.int64]
RANDAUGMENT_STREAM, JITTER_STREAM = 31, 32
LAYERS, PROBABILITY = 2, 0.5
LEVELS = 10  # magnitudes go from 0 to 10
MOST_DEGREES, MOST_SHEAR, MOST_SHIFT = 30.0, 0.3, 0.45  # at magnitude 10; the shift as a share of the side
MOST_CHANGE, LEAST_FACTOR = 0.9, 0.1  # of colour, contrast, brightness and sharpness
MOST_ADDED, ADDED_BELOW = 110, 128  # of 255
Op = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def randaugment(
    images: torch.Tensor,
    fill: torch.Tensor,
    seed: int,
    epoch: int,
    sample_ids: Ints,
    magnitude: float = 9.0,
    std: float = 0.5,
) -> torch.Tensor:
    """Images float[n, 3, h, w] in [0, 1] → the same, changed.

    Args:
        fill: float[3], the colour of what comes in from outside of an image.
        sample_ids: int64[n], on the host.
        magnitude: 0 to 10, the mean.
        std: of the magnitude.
    """
    names = list(OPERATIONS)
    for layer in range(LAYERS):
        draw = [uniform(seed, RANDAUGMENT_STREAM, epoch, sample_ids, layer, k) for k in range(4)]
        chosen = (draw[0] * len(names)).astype(np.int64)
        done = draw[1] < PROBABILITY
        levels = np.clip(magnitude + std * ndtri(np.maximum(draw[2], 1e-9)), 0, LEVELS) / LEVELS
        signs = np.where(draw[3] < 0.5, -1.0, 1.0)
        changed = images.clone()
        for nth, name in enumerate(names):
            rows = np.flatnonzero((chosen == nth) & done)
            if len(rows):
                index, level, sign = (
                    torch.from_numpy(values).to(images.device, non_blocking=True)
                    for values in (rows, levels[rows], signs[rows])
                )
                operation = OPERATIONS[name]
                changed[index] = operation(images[index], level.to(images), sign.to(images), fill)
        images = changed
    return images


def jitter(images: torch.Tensor, most: float, seed: int, epoch: int, sample_ids: Ints) -> torch.Tensor:
    """uint8[n, 3, h, w] with brightness, contrast and saturation each times a factor of 1 − most to 1 + most, each image by
    itself; a pure function of (seed, epoch, sample id: int64[n], on the host)."""
    changed = images.float() / 255
    for k, change in enumerate(
        (
            enhance.adjust_brightness_accumulative,
            enhance.adjust_contrast_with_mean_subtraction,
            enhance.adjust_saturation_with_gray_subtraction,
        )
    ):
        factor = 1 + most * (2 * uniform(seed, JITTER_STREAM, epoch, sample_ids, k) - 1)
        changed = change(changed, torch.from_numpy(factor).to(changed, non_blocking=True))
    return (changed * 255).round().to(torch.uint8)


def _autocontrast(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """Each channel from 0 to 1; one that is flat stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def _posterize(x: torch.Tensor, level: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """Fewer bits a channel, 4 at level 0."""
    lost = 4 + (level * 4).long()
    pixels = (x * 255).round().to(torch.int64)
    return ((pixels >> _wide(lost) << _wide(lost)) / 255).to(x)


def _solarize(x: torch.Tensor, level: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """What is bright is inverted: at level 1, all."""
    threshold = 256 - (level * 256).floor()
    return torch.where(x * 255 + 0.5 >= _wide(threshold), 1 - x, x)


def _solarize_add(x: torch.Tensor, level: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """What is dark is made brighter."""
    added = (level * MOST_ADDED).floor() / 255
    return torch.where(x * 255 + 0.5 < ADDED_BELOW, (x + _wide(added)).clamp(max=1), x)


def _factor(level: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    return (1 + sign * level * MOST_CHANGE).clamp(min=LEAST_FACTOR)


def _affine(x: torch.Tensor, rows: tuple[tuple[torch.Tensor, ...], ...], fill: torch.Tensor) -> torch.Tensor:
    """Each pixel (column, row), counted from the centre of the image, is taken from (a·column + b·row + c,
    d·column + e·row + f); rows: ((a, b, c), (d, e, f)), each [n]."""
    height, width = x.shape[2:]
    (a, b, c), (d, e, f) = rows
    # Of a grid from -1 to 1 on both axes.
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
    """Counter-clockwise."""
    angle = -sign * level * math.radians(MOST_DEGREES)
    zero = torch.zeros_like(angle)
    return _affine(x, ((angle.cos(), angle.sin(), zero), (-angle.sin(), angle.cos(), zero)), fill)


def _shear(axis: int) -> Op:
    def shear(x: torch.Tensor, level: torch.Tensor, sign: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        """About the corner of the image, as Pillow's."""
        amount = sign * level * MOST_SHEAR
        one, zero = torch.ones_like(amount), torch.zeros_like(amount)
        height, width = x.shape[2:]
        if axis == 0:
            return _affine(x, ((one, amount, amount * height / 2), (zero, one, zero)), fill)
        return _affine(x, ((one, zero, zero), (amount, one, amount * width / 2)), fill)

    return shear


def _translate(axis: int) -> Op:
    def translate(
        x: torch.Tensor, level: torch.Tensor, sign: torch.Tensor, fill: torch.Tensor
    ) -> torch.Tensor:
        shift = sign * level * MOST_SHIFT * x.shape[3 - axis]
        one, zero = torch.ones_like(shift), torch.zeros_like(shift)
        along = (shift, zero) if axis == 0 else (zero, shift)
        return _affine(x, ((one, zero, along[0]), (zero, one, along[1])), fill)

    return translate


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


OPERATIONS: dict[str, Op] = {
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
