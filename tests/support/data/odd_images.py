"""A zoo of JPEGs and PNGs that are not plain RGB, or are not stored plainly."""

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

from pipeline.build.synthetic import draw_scene


def picture(width: int = 301, height: int = 203) -> Image.Image:
    scene = Image.open(io.BytesIO(draw_scene(0, 0, 3))).convert("RGB")
    return scene.resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(pixels: np.ndarray, interlaced: bool = False, sbit: int | None = None) -> bytes:
    """A PNG that Pillow cannot write: pixels[height, width, channels] of 8 or 16 bits."""
    height, width, channels = pixels.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:  # Adam7: (x, y) of the first pixel and the steps
        passes = [
            (0, 0, 8, 8),
            (4, 0, 8, 8),
            (0, 4, 4, 8),
            (2, 0, 4, 4),
            (0, 2, 2, 4),
            (1, 0, 2, 2),
            (0, 1, 1, 2),
        ]
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = [
        b"\0" + big_endian[y, x0::dx].tobytes() for x0, y0, dx, dy in passes for y in range(y0, height, dy)
    ]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, kind, 0, 0, interlaced)
    bits = [(b"sBIT", bytes([sbit] * channels))] if sbit else []
    chunks = [(b"IHDR", head), *bits, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    framed = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@cache
def zoo() -> dict[str, bytes]:
    rgb, grey = picture(), picture().convert("L")
    palette = rgb.quantize(64)
    transparent = rgb.copy()
    transparent.putalpha(Image.fromarray(np.tile(np.arange(301, dtype=np.uint8), (203, 1))))
    deep = np.asarray(rgb).astype(np.uint16) * 256 + 99
    return {
        "baseline 4:4:4": saved(rgb, "JPEG", quality=92, subsampling=0),
        "baseline 4:2:2": saved(rgb, "JPEG", quality=92, subsampling=1),
        "baseline 4:2:0": saved(rgb, "JPEG", quality=92, subsampling=2),
        "best quality": saved(rgb, "JPEG", quality=100),
        "worst quality": saved(rgb, "JPEG", quality=1),
        "own Huffman tables": saved(rgb, "JPEG", quality=92, optimize=True),
        "progressive": saved(rgb, "JPEG", quality=92, progressive=True),
        "restart markers": saved(rgb, "JPEG", quality=92, restart_marker_blocks=3),
        "grey JPEG": saved(grey, "JPEG", quality=92),
        "progressive grey": saved(grey, "JPEG", quality=92, progressive=True),
        "CMYK JPEG": saved(rgb.convert("CMYK"), "JPEG", quality=92),
        "JPEG stored as RGB": saved(rgb, "JPEG", quality=92, keep_rgb=True),
        "EXIF JPEG": saved(rgb, "JPEG", quality=92, exif=rotated()),
        "JPEG with bytes behind it": saved(rgb, "JPEG", quality=92) + b"trailer" * 99,
        "PNG RGB": saved(rgb, "PNG"),
        "PNG EXIF": saved(rgb, "PNG", exif=rotated()),
        "PNG grey": saved(grey, "PNG"),
        "PNG grey, one grey transparent": saved(grey, "PNG", transparency=3),
        "PNG RGB, one colour transparent": saved(rgb, "PNG", transparency=(1, 2, 3)),
        "PNG palette": saved(palette, "PNG"),
        "PNG palette, one colour transparent": saved(palette, "PNG", transparency=3),
        "PNG palette, transparencies": saved(palette, "PNG", transparency=bytes(range(0, 256, 4))),
        "PNG RGBA": saved(transparent, "PNG"),
        "PNG LA": saved(transparent.convert("LA"), "PNG"),
        "PNG 1-bit": saved(rgb.convert("1"), "PNG"),
        "PNG 16-bit grey": png(deep[..., :1]),
        "PNG 16-bit RGB": png(deep),
        "PNG 16-bit RGBA": png(np.concatenate([deep, deep[..., :1]], axis=2)),
        "PNG interlaced": png(np.asarray(rgb), interlaced=True),
    }
