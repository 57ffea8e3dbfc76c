"""Complete JPEGs and PNGs whose end is missing, so that all decoders read what is there."""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def complete(data: bytes) -> bytes | None:
    """The same image with an end: the missing part is grey (JPEG) or black (PNG). None if it is neither.

    A JPEG only gets the marker of its end; the pixels of a PNG are compressed again. ValueError or zlib.error if nothing
    of a PNG's pixels is there.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return data + b"\xff\xd9"
    return _complete_png(data) if data.startswith(SIGNATURE) else None


def _complete_png(data: bytes) -> bytes:
    before, compressed, at = [], b"", len(SIGNATURE)
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + 8 + size]
        if kind == b"IDAT":
            compressed += content
        elif kind == b"IEND":
            break
        elif not compressed:
            before.append((kind, content))
        at += size + 12
    if not before or before[0][0] != b"IHDR" or not compressed:
        raise ValueError("the image is cut off before its pixels")
    width, height, bits, colours, _, _, interlaced = struct.unpack(">IIBBBBB", before[0][1])
    wanted = _raw_bytes(width, height, bits * CHANNELS[colours], bool(interlaced))
    raw = zlib.decompressobj().decompress(compressed, wanted)
    chunks = [*before, (b"IDAT", zlib.compress(raw.ljust(wanted, b"\0"), 6)), (b"IEND", b"")]
    framed = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return SIGNATURE + b"".join(framed)


def _raw_bytes(width: int, height: int, bits: int, interlaced: bool) -> int:
    """The size of a PNG's filtered rows in bytes; `bits` are those of a pixel."""
    total = 0
    for x, y, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // across), -(-(height - y) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * bits // 8))
    return total
