from typing_extensions import Buffer

def crop(encoded: Buffer, y: int, x: int, height: int, width: int, flip: bool, out: Buffer, /) -> bool:
    """Decode that box of a JPEG into `out`, uint8[3, size, size], RGB, contiguous.

    False, and `out` untouched, if it is no JPEG of one or three components.
    ValueError if it is damaged, or smaller than its box.
    """
