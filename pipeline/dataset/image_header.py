"""Read the width and height of an image from its first bytes."""

import io
from collections.abc import Callable

from PIL import Image

from pipeline.errors import why_undecodable

FIRST_READ = 4 << 10  # bytes: enough for most images; Exif data, ICC profiles and thumbnails need more
MAX_READ = 16 << 20


def image_size(read: Callable[[int], bytes], size: int) -> tuple[int, int]:
    """Return (width, height) in pixels, as stored: EXIF orientation is ignored.

    Args:
        read: called with n, returns the first n bytes of the image.
        size: of the image in bytes.

    ValueError, with the reason, if it is not a JPEG, PNG or WebP image, or its header is damaged.
    """
    limit = min(size, MAX_READ)
    wanted = min(FIRST_READ, limit)
    while True:
        head = read(wanted)
        try:
            if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
                return _check_not_empty(_webp_size(head))
            if not head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
                wanted = limit
                raise ValueError("not a JPEG, PNG or WebP image")
            with Image.open(io.BytesIO(head), formats=("JPEG", "PNG")) as image:
                return _check_not_empty(image.size)
        except Exception as error:  # on incomplete or damaged bytes Pillow raises almost any exception
            if wanted == limit:
                raise ValueError(why_undecodable(error)) from error
            wanted = min(8 * wanted, limit)


def _check_not_empty(size: tuple[int, int]) -> tuple[int, int]:
    if 0 in size:
        raise ValueError(f"the image has {size[0]} × {size[1]} pixels")
    return size


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height of a WebP image (RFC 9649). Pillow would need the whole file, and may be built without WebP."""

    def number(start: int, size: int) -> int:
        if len(head) < start + size:
            raise ValueError("the WebP header is cut off")
        return int.from_bytes(head[start : start + size], "little")

    kind = head[12:16]
    if kind == b"VP8X":
        return number(24, 3) + 1, number(27, 3) + 1
    if kind == b"VP8L" and number(20, 1) == 0x2F:
        bits = number(21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and number(23, 3) == 0x2A019D:
        return number(26, 2) & 0x3FFF, number(28, 2) & 0x3FFF
    raise ValueError("the WebP header is damaged")
