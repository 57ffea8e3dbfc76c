"""Check an image, and convert it if requested, before it is written to a shard."""

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import why_undecodable
from pipeline.images.convert import convert, significant_bits
from pipeline.images.formats import (
    EXTENSIONS,
    MAX_PIXELS,
    Format,
    ImageInfo,
    any_size_info,
    check_size,
    image_format,
    read_pixels,
)
from pipeline.images.kinds import bits_of
from pipeline.images.pixels import Dtype, Pixels
from pipeline.images.truncated import complete

# Format → the extension that it gets in a tar.
EXTENSION_OF: dict[Format, str] = {name: extension for extension, name in reversed(EXTENSIONS.items())}
PLAIN_MODES = {"RGB", "L"}  # of JPEGs that every decoder reads
MAX_SHRUNK = 1_000_000_000  # pixels of an image that is made smaller
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Conversion:
    """Which images are converted.

    A converted image is an RGB or greyscale JPEG without metadata. Images that are made smaller and have 16 bits, floats, or
    neither one nor three channels become TIFFs of their type.
    """

    shorter_side: int | None = None  # at most, in pixels; larger images are scaled down
    longer_side: int | None = None  # at most, in pixels
    rgb_jpeg: bool = False  # whether to convert CMYK JPEGs and all other formats
    quality: int = 90  # JPEG quality of converted images
    bits: int | None = (
        None  # significant bits of 16-bit images; None: what their files say or their values use
    )
    allow_truncated: bool = False  # whether to complete JPEGs and PNGs whose end is missing
    page: int = 1  # of TIFFs, counted from 1

    def __str__(self) -> str:
        parts = [
            *([f"shorter side at most {self.shorter_side} pixels"] if self.shorter_side else []),
            *([f"longer side at most {self.longer_side} pixels"] if self.longer_side else []),
            *(["RGB or greyscale JPEGs only"] if self.rgb_jpeg else []),
            *(["missing ends filled"] if self.allow_truncated else []),
            *([f"page {self.page} of TIFFs"] if self.page > 1 else []),
        ]
        return f"{', '.join(parts)}; JPEG quality {self.quality}" if parts else "untouched"

    def changes(self) -> dict[str, Any]:
        """What the bytes of a build depend on. Options that came later are in it only if they are used."""
        later = {"bits": self.bits, "allow_truncated": self.allow_truncated, "page": self.page - 1}
        return {
            "shorter_side": self.shorter_side,
            "longer_side": self.longer_side,
            "rgb_jpeg": self.rgb_jpeg,
            "quality": self.quality,
        } | {name: value for name, value in later.items() if value}

    def scale(self, width: int, height: int) -> float:
        """The factor, at most 1, by which an image of this size in pixels is scaled down."""
        return min(
            1.0,
            (self.shorter_side or width + height) / min(width, height),
            (self.longer_side or width + height) / max(width, height),
        )


@dataclass(frozen=True)
class CheckedImage:
    """An image as it is written to a shard."""

    data: bytes
    extension: str
    width: int
    height: int
    odd: str = ""  # "PNG", "CMYK", …: what the source's image is if not an RGB or greyscale JPEG
    changed: bool = False  # whether it was converted
    channels: int = 3
    dtype: Dtype = "uint8"
    bits: int = 0  # of a 16-bit image: what its file says, or its values use; 0 for other types
    bits_found: bool = False  # whether these were found by values
    # Of a 16-bit image that was converted to 8 bits as if all 16 were used: the bits that its values use.
    bits_lost: int = 0


def check_image(data: bytes, decode: bool = True, conversion: Conversion | None = None) -> CheckedImage:
    """Check that an image can be decoded, and convert it where `conversion` asks for it.

    Args:
        data: a file of any format of `pipeline.images.formats`.
        decode: whether to decode the image; otherwise only its header is read.

    ValueError, with the reason, if the image cannot be read.
    """
    try:
        return _check(data, decode, conversion)
    except Exception as error:  # on damaged bytes Pillow raises almost any exception
        reason = why_undecodable(error)
        if not _is_truncated(data, reason):
            raise ValueError(reason) from error
        if not (conversion and conversion.allow_truncated):
            raise ValueError(f"{reason}; `maestream shards build --allow-truncated` keeps it") from error
    try:
        completed = complete(data) or b""
        checked = _check(completed, True, conversion)
    except Exception as error:
        raise ValueError(why_undecodable(error)) from error
    return replace(checked, odd="truncated", changed=True)


def _is_truncated(data: bytes, reason: str) -> bool:
    """Whether a reason says that the end of a JPEG or PNG is missing."""
    words = ("truncated", "broken data stream", "unexpected end", "too small")
    return image_format(data) in ("JPEG", "PNG") and any(word in reason.lower() for word in words)


def _check(data: bytes, decode: bool, conversion: Conversion | None) -> CheckedImage:
    format = image_format(data)
    if format == "TIFF" and conversion and conversion.page > 1:
        from pipeline.images.tiff import extract_page

        page = extract_page(data, conversion.page)
        return replace(
            _check_any(page, decode, conversion), odd=f"TIFF, page {conversion.page}", changed=True
        )
    is_deep = format == "PNG" and len(data) > 24 and data[24] == 16
    if format in ("JPEG", "PNG") and not is_deep:
        return _check_with_pillow(data, decode, conversion)
    return _check_any(data, decode, conversion)


def _check_with_pillow(data: bytes, decode: bool, conversion: Conversion | None) -> CheckedImage:
    """Check a JPEG, or a PNG of 8 bits."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        width, height = image.size
        extension = "png" if image.format == "PNG" else "jpg"
        channels = 1 if image.mode in ("L", "LA") else 3
        odd = image.mode if extension == "jpg" else "PNG"
        if odd in PLAIN_MODES:
            odd = ""
        scale = conversion.scale(width, height) if conversion else 1.0
        check_size(width, height, MAX_SHRUNK if scale < 1 else MAX_PIXELS)
        if conversion and (scale < 1 or (odd and conversion.rgb_jpeg)):
            converted = _convert_with_pillow(image, scale)
            jpeg = _to_jpeg(converted, conversion.quality)
            return CheckedImage(jpeg, "jpg", *converted.size, odd, changed=True, channels=channels)
        if decode:
            # Decoding at 1/8 resolution still reads and checks the whole file, in less than half the time.
            image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
            image.load()
        return CheckedImage(data, extension, width, height, odd, channels=channels)


def _convert_with_pillow(image: Image.Image, scale: float) -> Image.Image:
    """Decode an image to RGB or greyscale, scaled by `scale`."""
    size = [max(round(scale * side), 1) for side in image.size]
    if scale < 0.5:  # let the JPEG decoder do the first halvings
        image.draft(None, (int(2 * scale * image.width), int(2 * scale * image.height)))
    decoded = image.convert("L" if image.mode == "L" else "RGB")
    if scale == 1:
        return decoded
    return decoded.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _check_any(data: bytes, decode: bool, conversion: Conversion | None) -> CheckedImage:
    """Check an image of any format and type."""
    info = any_size_info(lambda at, size: data[at : at + size], len(data))
    scale = conversion.scale(info.width, info.height) if conversion else 1.0
    check_size(info.width, info.height, MAX_SHRUNK if scale < 1 else MAX_PIXELS)
    odd = f"{info.format} without its {info.note}" if info.note else info.format
    is_converted = conversion is not None and (scale < 1 or conversion.rgb_jpeg)
    if not (decode or is_converted):
        bits = info.bits if info.dtype == "uint16" else 0
        return _checked(data, info, odd, bits, bits_found=False)
    pixels = read_pixels(data, MAX_SHRUNK)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError("the image has values that are not finite numbers (NaN or infinity)")
    said = significant_bits(data, pixels, 0) if pixels.dtype == np.uint16 else 0
    bits = said or (bits_of(int(pixels.max())) if pixels.dtype == np.uint16 else 0)
    if conversion is None or not is_converted:
        return _checked(data, info, odd, bits, bits_found=not said)
    return _converted(pixels, scale, conversion, odd, bits, said or conversion.bits or 0)


def _checked(data: bytes, info: ImageInfo, odd: str, bits: int, bits_found: bool) -> CheckedImage:
    """The image as it is."""
    size, kind = (info.width, info.height), (info.channels, info.dtype)
    return CheckedImage(
        data, EXTENSION_OF[info.format], *size, odd, False, *kind, bits, bits_found and bits > 0
    )


def _converted(
    pixels: Array, scale: float, conversion: Conversion, odd: str, bits: int, known: int
) -> CheckedImage:
    """The image [h, w, channels] as a smaller one, or as a JPEG. `known`: its significant bits, or 0."""
    height, width, channels = pixels.shape
    size = (max(round(scale * width), 1), max(round(scale * height), 1))
    if not conversion.rgb_jpeg and (channels not in (1, 3) or pixels.dtype != np.uint8):
        from pipeline.images.tiff import write_tiff

        smaller = _resize(pixels, size)
        file = write_tiff(smaller, known or 16)
        dtype: Any = pixels.dtype.name
        return CheckedImage(file, "tif", *size, odd, True, channels, dtype, bits, bits > 0 and not known)
    if channels not in (1, 3):
        raise ValueError(f"the image has {channels} channels, and a JPEG has 1 or 3: leave out --rgb-jpeg")
    own = 8 if pixels.dtype == np.uint8 else known or 16
    eight = convert(pixels, own, Pixels(channels=channels))
    image = Image.fromarray(eight if channels == 3 else eight[..., 0])
    if scale < 1:
        image = image.resize(size, Image.Resampling.BICUBIC)
    lost = bits if pixels.dtype == np.uint16 and not known else 0
    jpeg = _to_jpeg(image, conversion.quality)
    return CheckedImage(jpeg, "jpg", *size, odd, True, channels, bits_lost=lost)


def _resize(pixels: Array, size: tuple[int, int]) -> Array:
    """Scale each channel of [h, w, channels] to `size` (width, height), in floats."""
    planes = [
        Image.fromarray(np.ascontiguousarray(plane, np.float32)).resize(size, Image.Resampling.BICUBIC)
        for plane in pixels.transpose(2, 0, 1)
    ]
    resized = np.stack([np.asarray(plane) for plane in planes], axis=2)
    if pixels.dtype.kind == "f":
        return resized
    return np.rint(resized).clip(0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)


def _to_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.info = {}  # Pillow would keep the JPEG comment
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
