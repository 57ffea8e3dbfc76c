"""Check an image, and convert it if requested, before it is written to a shard."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.errors import why_undecodable

# Pillow's format name → file extension.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
PLAIN_MODES = {"RGB", "L"}  # of JPEGs that every decoder reads


@dataclass(frozen=True)
class Conversion:
    """Which images are converted. A converted image is an RGB or greyscale JPEG without metadata."""

    shorter_side: int | None = None  # at most, in pixels; larger images are scaled down
    longer_side: int | None = None  # at most, in pixels
    rgb_jpeg: bool = False  # whether to convert PNG, WebP and CMYK JPEG images
    quality: int = 90  # JPEG quality of converted images

    def __str__(self) -> str:
        parts = [
            *([f"shorter side at most {self.shorter_side} pixels"] if self.shorter_side else []),
            *([f"longer side at most {self.longer_side} pixels"] if self.longer_side else []),
            *(["RGB or greyscale JPEGs only"] if self.rgb_jpeg else []),
        ]
        return f"{', '.join(parts)}; JPEG quality {self.quality}" if parts else "untouched"

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


def check_image(data: bytes, decode: bool = True, conversion: Conversion | None = None) -> CheckedImage:
    """Check that an image can be decoded, and convert it where `conversion` asks for it.

    Args:
        data: a JPEG, PNG or WebP file.
        decode: whether to decode the image; otherwise only its header is read.

    ValueError, with the reason, if the image cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in EXTENSIONS:
                raise ValueError(f"{image.format} is not supported")
            width, height = image.size
            extension = EXTENSIONS[image.format]
            odd = image.mode if extension == "jpg" else extension.upper()
            if odd in PLAIN_MODES:
                odd = ""
            scale = conversion.scale(width, height) if conversion else 1.0
            if conversion and (scale < 1 or (odd and conversion.rgb_jpeg)):
                converted = _convert(image, scale)
                jpeg = _to_jpeg(converted, conversion.quality)
                return CheckedImage(jpeg, "jpg", *converted.size, odd, changed=True)
            if decode:
                # Decoding at 1/8 resolution still reads and checks the whole file, in less than half the time.
                image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
                image.load()
            return CheckedImage(data, extension, width, height, odd)
    except Exception as error:  # on damaged bytes Pillow raises almost any exception
        raise ValueError(why_undecodable(error)) from error


def _convert(image: Image.Image, scale: float) -> Image.Image:
    """Decode an image to RGB or greyscale, scaled by `scale`."""
    size = [max(round(scale * side), 1) for side in image.size]
    if scale < 0.5:  # let the JPEG decoder do the first halvings
        image.draft(None, (int(2 * scale * image.width), int(2 * scale * image.height)))
    decoded: Image.Image = image
    if image.mode.startswith("I"):  # 16-bit greyscale: Pillow's conversion would clip it to white
        image.load()
        decoded = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    decoded = decoded.convert("L" if decoded.mode == "L" else "RGB")
    if scale == 1:
        return decoded
    return decoded.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _to_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.info = {}  # Pillow would keep the JPEG comment
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
