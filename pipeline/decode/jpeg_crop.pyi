from typing_extensions import Buffer

def crop(
    encoded: Buffer, y: int, x: int, height: int, width: int, flip: bool, out: Buffer, /
) -> tuple[float, float] | None:
    """Decode the box of a JPEG, resize and flip it, and write it to `out`: uint8[3, h, w], RGB, contiguous.

    Returns the seconds spent on decoding and on resizing. Returns None, and leaves `out` unchanged, if the file is not a
    JPEG of one or three components. Raises ValueError if it is damaged, or smaller than its box.
    """
