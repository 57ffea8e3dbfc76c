"""Width and height of an image from its first bytes."""

import io
from collections.abc import Callable

from PIL import Image

from pipeline.errors import why_undecodable

FIRST_READ = 4 << 10  # enough for most images; Exif, ICC profiles and thumbnails need more
MAX_READ = 16 << 20


def image_size(read: Callable[[int], bytes], size: int) -> tuple[int, int]:
    """(width, height) in pixels as stored: EXIF orientation is ignored.

    Args:
        read: gives that many of the image's first bytes.
        size: of the image in bytes.

    ValueError, with the reason, where it is no JPEG, PNG or WebP, or its header is damaged.
    """
    limit = min(size, MAX_READ)
    wanted = min(FIRST_READ, limit)
    while True:
        head = read(wanted)
        try:
            if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
                return _with_area(_webp_size(head))
            if not head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
                wanted = limit
                raise ValueError("it is no JPEG, PNG or WebP")
            with Image.open(io.BytesIO(head), formats=("JPEG", "PNG")) as image:
                return _with_area(image.size)
        except Exception as error:  # cut and damaged bytes make Pillow raise nearly anything
            if wanted == limit:
                raise ValueError(why_undecodable(error)) from error
            wanted = min(8 * wanted, limit)


def _with_area(size: tuple[int, int]) -> tuple[int, int]:
    if 0 in size:
        raise ValueError(f"it is {size[0]} × {size[1]} pixels")
    return size


def _webp_size(head: bytes) -> tuple[int, int]:
    """Pillow needs the whole file for this, and may be built without WebP. RFC 9649."""

    def number(start: int, size: int) -> int:
        if len(head) < start + size:
            raise ValueError("its WebP header is cut off")
        return int.from_bytes(head[start : start + size], "little")

    kind = head[12:16]
    if kind == b"VP8X":
        return number(24, 3) + 1, number(27, 3) + 1
    if kind == b"VP8L" and number(20, 1) == 0x2F:
        bits = number(21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and number(23, 3) == 0x2A019D:
        return number(26, 2) & 0x3FFF, number(28, 2) & 0x3FFF
    raise ValueError("its WebP header is damaged")
