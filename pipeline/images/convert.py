"""Give pixels another type: number of channels, dtype, significant bits."""

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.images.formats import image_format, image_info
from pipeline.images.pixels import Pixels

LUMA = (19595, 38470, 7471)  # red, green, blue, in 1/65536: ITU-R 601, as Pillow does
Array = npt.NDArray[Any]


def convert(crop: Array, bits: int, wanted: Pixels) -> Array:
    """The pixels [h, w, c] in the wanted type: grey becomes RGB and RGB grey; integers are scaled to the wanted bits.

    Args:
        crop: as `read_pixels` returns them.
        bits: significant bits of the values, see `significant_bits`.

    ValueError, with the reason, for any other change of channels or dtype, and for values that are not finite.
    """
    channels = crop.shape[2]
    if problem := type_problem(channels, crop.dtype.name, wanted):
        raise ValueError(problem)
    crop = _to_dtype(crop, bits, wanted)
    if channels == wanted.channels:
        return crop
    return np.repeat(crop, 3, axis=2) if channels == 1 else to_grey(crop)


def type_problem(channels: int, dtype: str, wanted: Pixels) -> str | None:
    """Why images of this type cannot be converted to the wanted one, or None."""
    if channels != wanted.channels and {channels, wanted.channels} != {1, 3}:
        return f"the image has {channels} channels, not {wanted.channels}"
    if dtype != wanted.dtype and "float32" in (dtype, wanted.dtype):
        return f"the image has {dtype} values, not {wanted.dtype}"
    return None


def to_grey(rgb: Array) -> Array:
    """The luma [h, w, 1] of [h, w, 3], of the same dtype."""
    if rgb.dtype.kind == "f":
        return (rgb @ (np.array(LUMA, rgb.dtype) / 65536))[..., None]
    weighted = rgb.astype(np.uint32) @ np.array(LUMA, np.uint32)
    return ((weighted + np.uint32(1 << 15)) >> 16).astype(rgb.dtype)[..., None]


def _to_dtype(crop: Array, bits: int, wanted: Pixels) -> Array:
    if crop.dtype.kind == "f" and not np.isfinite(crop).all():
        raise ValueError("the image has values that are not finite numbers (NaN or infinity)")
    if wanted.dtype == "float32":
        return crop
    to_bits = 8 if wanted.dtype == "uint8" else wanted.bits
    if bits == to_bits:
        return crop.astype(wanted.dtype, copy=False)
    if bits < 16 and crop.size and int(crop.max()) >> bits:
        raise ValueError(
            f"the image has values above {(1 << bits) - 1:,}, the most for {bits} bits: make the dataset again with --bits 16"
        )
    scale = ((1 << to_bits) - 1) / ((1 << bits) - 1)
    return (crop.astype(np.float32) * np.float32(scale) + np.float32(0.5)).astype(wanted.dtype)


def significant_bits(data: bytes | memoryview, pixels: Array, default: int) -> int:
    """The significant bits of an image's values.

    Args:
        data, pixels: of the image, see `read_pixels`.
        default: of 16-bit images whose file does not say.
    """
    if pixels.dtype != np.uint16:
        return 8 * pixels.dtype.itemsize
    if image_format(data) == "PNG":
        return _png_bits(data, pixels) or default
    bits = image_info(lambda at, size: bytes(data[at : at + size]), len(data)).bits
    return default if bits == 16 else bits


def png_has_sbit(data: bytes | memoryview) -> bool:
    """Whether a PNG has the chunk sBIT."""
    return _sbit(data) is not None


def _png_bits(data: bytes | memoryview, pixels: Array) -> int | None:
    """The significant bits of a 16-bit PNG, by its chunk sBIT; None if it does not say.

    The standard wants values scaled to 16 bits whatever sBIT says. Values that are not scaled lie below 2^sBIT, and their
    low bits are neither zero nor a copy of the high ones.
    """
    bits = _sbit(data)
    if bits is None or not 8 <= bits < 16 or int(pixels.max()) >> bits:
        return None
    low = 16 - bits
    shifted = not (pixels & ((1 << low) - 1)).any()
    return None if shifted else bits


def _sbit(data: bytes | memoryview) -> int | None:
    """The largest number in the chunk sBIT of a PNG, or None."""
    at = 8
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind == b"sBIT":
            return max(data[at + 8 : at + 8 + size], default=None)
        if kind in (b"PLTE", b"IDAT"):  # sBIT comes before these
            return None
        at += size + 12
    return None
