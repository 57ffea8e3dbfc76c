"""What is looked at in an image before it is written into a shard, and what may be changed of it."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.errors import why_undecodable

MEMBER_EXTENSION = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # of PIL's name of the format
PLAIN = {"RGB", "L"}  # modes of JPEGs that every decoder knows


@dataclass(frozen=True)
class Changes:
    """What is done to an image, if it has to be: then it is a JPEG, RGB or grey, without metadata."""

    shorter_side: int | None = None  # pixels, at most
    longer_side: int | None = None
    rgb_jpeg: bool = False  # whether PNGs, WebPs and CMYK JPEGs are changed into RGB JPEGs
    quality: int = 90  # of JPEG

    def __str__(self) -> str:
        said = [
            *([f"shorter side at most {self.shorter_side} pixels"] if self.shorter_side else []),
            *([f"longer side at most {self.longer_side} pixels"] if self.longer_side else []),
            *(["RGB or grey JPEGs only"] if self.rgb_jpeg else []),
        ]
        return f"{', '.join(said)}; what was changed has JPEG quality {self.quality}" if said else "untouched"

    def scale(self, width: int, height: int) -> float:
        """How much smaller an image is made, 1 for not at all."""
        return min(
            1.0,
            (self.shorter_side or width + height) / min(width, height),
            (self.longer_side or width + height) / max(width, height),
        )


@dataclass(frozen=True)
class Checked:
    """An image to be written, and what it was."""

    data: bytes
    extension: str
    width: int
    height: int
    odd: str = ""  # "PNG", "CMYK", …, if it was not an RGB or grey JPEG
    changed: bool = False


def check_image(data: bytes, decode: bool = True, changes: Changes | None = None) -> Checked:
    """Look at an image, at its header or, with `decode`, at all of it, and change it if that is wanted.

    ValueError, with the reason, where it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in MEMBER_EXTENSION:
                raise ValueError(f"{image.format} is not supported")
            width, height = image.size
            extension = MEMBER_EXTENSION[image.format]
            odd = (
                ""
                if extension == "jpg" and image.mode in PLAIN
                else image.mode
                if extension == "jpg"
                else extension.upper()
            )
            scale = changes.scale(width, height) if changes else 1.0
            if changes and (scale < 1 or (odd and changes.rgb_jpeg)):
                small = _shrink(image, scale)
                return Checked(_to_jpeg(small, changes.quality), "jpg", *small.size, odd, True)
            if decode:
                # An eighth in each direction: all of the file is read and checked, in less than half of the time.
                image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
                image.load()
            return Checked(data, extension, width, height, odd)
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        raise ValueError(why_undecodable(error)) from error


def _shrink(image: Image.Image, scale: float) -> Image.Image:
    """Whole, in RGB or grey, `scale` as large."""
    size = [max(round(scale * side), 1) for side in image.size]
    if scale < 0.5:  # what is far too large is not decoded in full
        image.draft(None, (int(2 * scale * image.width), int(2 * scale * image.height)))
    whole: Image.Image = image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips it to white
        image.load()
        whole = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    whole = whole.convert("L" if whole.mode == "L" else "RGB")
    if scale == 1:
        return whole
    return whole.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _to_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.info = {}  # Pillow would keep the comment
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
