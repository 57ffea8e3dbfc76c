"""Pictures of images with any number of channels and any type of pixels."""

from collections.abc import Sequence

import torch

from pipeline.errors import UserError
from pipeline.text import plural

CONTRAST = 2.0  # standard deviations on each side of the mean that a picture shows


def picture_bands(channels: int, bands: Sequence[int] | None = None) -> list[int]:
    """Return which channels a picture shows as red, green and blue, counted from 0.

    Args:
        channels: of the images.
        bands: one channel, which is shown in grey, or three, counted from 1. Default: the first three, or the first one of
            images with fewer.

    Raises UserError if there are no such channels.
    """
    if bands is None:
        bands = (1, 2, 3) if channels >= 3 else (1,)
    text = ",".join(map(str, bands))
    if len(bands) not in (1, 3):
        raise UserError(f"--bands {text}: expected 3 bands, for red, green and blue, or 1 for grey")
    if outside := [band for band in bands if not 1 <= band <= channels]:
        raise UserError(
            f"--bands {text}: there is no band {outside[0]}: the images have {plural(channels, 'band')}, counted from 1"
        )
    return [band - 1 for band in bands] * (3 // len(bands))


def draw_bands(
    images: torch.Tensor, bands: Sequence[int], contrast: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """Draw three bands of images as RGB.

    Args:
        images: float[n, c, h, w]; in [0, 1] for pictures without contrast scaling.
        bands: see `picture_bands`.
        contrast: mean and standard deviation of each channel, float[c]: the range of CONTRAST standard deviations around the
            mean becomes black to white. None: 0 is black and 1 is white.

    Returns uint8[n, 3, h, w], on the device of `images`.
    """
    chosen = images[:, list(bands)]
    if contrast is not None:
        mean, std = (values.to(images).flatten()[list(bands)].view(1, -1, 1, 1) for values in contrast)
        chosen = ((chosen - mean) / (2 * CONTRAST * std.clamp(min=1e-12)) + 0.5).nan_to_num(0.0)
    return (chosen * 255).round().clamp(0, 255).to(torch.uint8)
