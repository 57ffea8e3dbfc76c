from typing_extensions import Buffer

def crop(
    encoded: Buffer, y: int, x: int, height: int, width: int, flip: bool, out: Buffer, /
) -> tuple[float, float] | None:
    """Decode that box of a JPEG into `out`, uint8[3, h, w], RGB, contiguous.

    Returns seconds that went into decoding it, and into resizing it.

    None, and `out` untouched, if it is no JPEG of one or three components.
    ValueError if it is damaged, or smaller than its box.
    """
