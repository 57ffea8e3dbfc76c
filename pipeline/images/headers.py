"""Read the headers of JPEG 2000, AVIF, JPEG XL and WebP, for which no library reads only the header."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.images.pixels import Dtype


class Header(NamedTuple):
    """What the header of an image says."""

    width: int  # pixels
    height: int
    channels: int  # without alpha
    dtype: Dtype
    bits: int  # of a value, as stored: 1 to 16, or 32 for floats
    alpha: bool = False


def _dtype(bits: int, is_integer: bool = True) -> Dtype:
    if not is_integer or bits > 16:
        return "float32"
    return "uint8" if bits <= 8 else "uint16"


# ---- boxes: the containers of JPEG 2000, AVIF and JPEG XL -----------------------------------------------------------


class Box(NamedTuple):
    """A box of a file: its kind, and where its content is."""

    kind: bytes
    begin: int
    end: int


def _boxes(data: bytes, begin: int = 0, end: int | None = None) -> Iterator[Box]:
    end = len(data) if end is None else end
    while begin + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, begin)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, begin + 8)[0], 16
        last = end if size == 0 else begin + size
        if size and size < head:
            raise ValueError("a box of the header is damaged")
        yield Box(kind, begin + head, last)
        begin = last


def _find(data: bytes, kind: bytes, begin: int = 0, end: int | None = None) -> Box:
    for box in _boxes(data, begin, end):
        if box.kind == kind:
            if box.end > len(data) and kind not in (b"jp2c", b"jxlc", b"jxlp"):
                raise ValueError("the header is cut off")
            return box
    raise ValueError(f"the header has no part {kind.decode()}")


# ---- JPEG 2000 (ISO 15444-1, annexes A and I) -----------------------------------------------------------------------


def jpeg2000_header(data: bytes) -> Header:
    """The header of a JP2 file or a code stream. ValueError if it is damaged or cut off."""
    is_stream = data[:4] == b"\xff\x4f\xff\x51"
    at = 4 if is_stream else _find(data, b"jp2c").begin + 4
    right, bottom, left, top = struct.unpack_from(">IIII", data, at + 4)
    count = struct.unpack_from(">H", data, at + 36)[0]
    depth = data[at + 38]  # of the first component; the highest bit means that values may be negative
    channels, bits, alpha = count, (depth & 0x7F) + 1, 0
    if not is_stream:
        begin, end = _find(data, b"jp2h")[1:]
        for box in _boxes(data, begin, end):
            if box.kind == b"pclr":
                channels, bits = data[box.begin + 2], 8
            if box.kind == b"cdef":
                entries = struct.iter_unpack(">HHH", data[box.begin + 2 : box.end])
                alpha = sum(kind in (1, 2) for _, kind, _ in entries)
    return Header(right - left, bottom - top, channels - alpha, _dtype(bits, depth < 0x80), bits, alpha > 0)


# ---- AVIF (ISO 14496-12 and 23008-12) -------------------------------------------------------------------------------


def avif_header(data: bytes) -> Header:
    """The header of an AVIF file's primary image. ValueError if it is damaged or cut off."""
    meta = _find(data, b"meta")
    inside = (meta.begin + 4, meta.end)
    pitm = _find(data, b"pitm", *inside).begin
    wide = data[pitm] > 0
    primary = int.from_bytes(data[pitm + 4 : pitm + (8 if wide else 6)], "big")
    iprp = _find(data, b"iprp", *inside)
    ipco = _find(data, b"ipco", *iprp[1:])
    properties = list(_boxes(data, *ipco[1:]))
    mine = [properties[i - 1] for i in _associated(data, _find(data, b"ipma", *iprp[1:]), primary)]
    ispe = next(box for box in mine if box.kind == b"ispe").begin
    width, height = struct.unpack_from(">II", data, ispe + 4)
    # A grid has its codec's settings at its tiles.
    codec = next(box for box in [*mine, *properties] if box.kind == b"av1C").begin
    flags = data[codec + 2]
    bits = 8 if not flags & 0x40 else 12 if flags & 0x20 else 10
    return Header(width, height, 1 if flags & 0x10 else 3, _dtype(bits), bits, _has_alpha(data, inside))


def _associated(data: bytes, ipma: Box, item: int) -> list[int]:
    """The numbers, from 1, of an item's properties."""
    version, flags = data[ipma.begin], data[ipma.begin + 3]
    at = ipma.begin + 8
    while at < ipma.end:
        number = int.from_bytes(data[at : at + (4 if version else 2)], "big")
        at += 4 if version else 2
        count, at = data[at], at + 1
        size = 2 if flags & 1 else 1
        indexes = [int.from_bytes(data[at + i * size : at + (i + 1) * size], "big") for i in range(count)]
        at += count * size
        if number == item:
            return [index & (0x7FFF if flags & 1 else 0x7F) for index in indexes if index]
    raise ValueError("the header does not describe the image")


def _has_alpha(data: bytes, meta: tuple[int, int]) -> bool:
    """Whether another image belongs to the primary one."""
    try:
        iref = _find(data, b"iref", *meta)
    except ValueError:
        return False
    return any(box.kind == b"auxl" for box in _boxes(data, iref.begin + 4, iref.end))


# ---- JPEG XL (ISO 18181-1, annexes D and E) -------------------------------------------------------------------------

RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width : height
Choice = tuple[int, int]  # (constant, number of bits that are added to it)
SIDE: tuple[Choice, ...] = ((1, 9), (1, 13), (1, 18), (1, 30))
ENUM: tuple[Choice, ...] = ((0, 0), (1, 0), (2, 4), (18, 6))
ALPHA, SPOT_COLOUR, CFA = 0, 2, 5  # kinds of extra channels


class _Bits:
    """Reads numbers from bits, the lowest bit of each byte first."""

    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data, "little"), 8 * len(data)

    def bits(self, count: int) -> int:
        if count > self.left:
            raise ValueError("the header is cut off")
        number = self.value & ((1 << count) - 1)
        self.value, self.left = self.value >> count, self.left - count
        return number

    def choice(self, *choices: Choice) -> int:
        constant, count = choices[self.bits(2)]
        return constant + self.bits(count)


def jpegxl_header(data: bytes) -> Header:
    """The header of a JPEG XL file or code stream. ValueError if it is damaged or cut off."""
    read = _Bits(_jpegxl_stream(data)[2:300])
    height, width = _jpegxl_size(read)
    if read.bits(1):  # all fields have their defaults
        return Header(width, height, 3, "uint8", 8)
    if read.bits(1):
        _skip_extra_fields(read)
    is_float, bits = _bit_depth(read)
    read.bits(1)  # whether 16-bit buffers suffice
    kinds = [_extra_channel(read) for _ in range(read.choice((0, 0), (1, 0), (2, 4), (1, 12)))]
    read.bits(1)  # whether it is encoded as XYB
    is_grey = False
    if not read.bits(1):  # the colour encoding is not the default
        read.bits(1)  # whether an ICC profile follows
        is_grey = read.choice(*ENUM) == 1
    dtype = "float32" if is_float else _dtype(bits)
    return Header(width, height, 1 if is_grey else 3, dtype, 32 if is_float else bits, ALPHA in kinds)


def _jpegxl_stream(data: bytes) -> bytes:
    if data[:2] == b"\xff\x0a":
        return data
    for box in _boxes(data):
        if box.kind in (b"jxlc", b"jxlp"):
            begin = box.begin + 4 * (box.kind == b"jxlp")
            return data[begin : min(box.end, begin + 300)]
    raise ValueError("the header has no code stream")


def _jpegxl_size(read: _Bits) -> tuple[int, int]:
    small = read.bits(1)

    def side() -> int:
        return (read.bits(5) + 1) * 8 if small else read.choice(*SIDE)

    height = side()
    ratio = read.bits(3)
    if ratio:
        across, down = RATIOS[ratio - 1]
        return height, height * across // down
    return height, side()


def _skip_extra_fields(read: _Bits) -> None:
    read.bits(3)  # orientation
    if read.bits(1):
        _jpegxl_size(read)  # the size to show it in
    if read.bits(1):
        raise ValueError("a JPEG XL header with a preview is not read")
    if read.bits(1):  # animation
        read.choice((100, 0), (1000, 0), (1, 10), (1, 30))
        read.choice((1, 0), (1001, 0), (1, 8), (1, 10))
        read.choice((0, 0), (0, 3), (0, 16), (0, 32))
        read.bits(1)


def _bit_depth(read: _Bits) -> tuple[bool, int]:
    """Whether values are floats, and their bits."""
    if not read.bits(1):
        return False, read.choice((8, 0), (10, 0), (12, 0), (1, 6))
    bits = read.choice((32, 0), (16, 0), (24, 0), (1, 6))
    read.bits(4)
    return True, bits


def _extra_channel(read: _Bits) -> int:
    """The kind of an extra channel."""
    if read.bits(1):
        return ALPHA
    kind = read.choice(*ENUM)
    _bit_depth(read)
    read.choice((0, 0), (3, 0), (4, 0), (1, 3))
    read.bits(8 * read.choice((0, 0), (0, 4), (16, 5), (48, 10)))  # name
    if kind == ALPHA:
        read.bits(1)
    if kind == SPOT_COLOUR:
        read.bits(64)
    if kind == CFA:
        read.choice((1, 0), (0, 2), (3, 4), (19, 8))
    return kind


# ---- WebP (RFC 9649) ------------------------------------------------------------------------------------------------


def webp_header(data: bytes) -> Header:
    """The header of a WebP file. ValueError if it is damaged or cut off."""

    def number(start: int, size: int) -> int:
        if len(data) < start + size:
            raise ValueError("the WebP header is cut off")
        return int.from_bytes(data[start : start + size], "little")

    kind, alpha = data[12:16], False
    if kind == b"VP8X":
        width, height, alpha = number(24, 3) + 1, number(27, 3) + 1, bool(number(20, 1) & 0x10)
    elif kind == b"VP8L" and number(20, 1) == 0x2F:
        bits = number(21, 4)
        width, height, alpha = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    elif kind == b"VP8 " and number(23, 3) == 0x2A019D:
        width, height = number(26, 2) & 0x3FFF, number(28, 2) & 0x3FFF
    else:
        raise ValueError("the WebP header is damaged")
    return Header(width, height, 3, "uint8", 8, alpha)
