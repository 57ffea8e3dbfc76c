"""The same picture in every format that maestream reads, and in every type that the format has."""

import io
import struct
from functools import cache

import imagecodecs
import numpy as np
import tifffile

from tests.support.data.odd_images import picture, png, saved

# Mean difference from the picture, in grey levels of 255, of formats that lose detail.
LOSS = {"JPEG": 2.0, "JPEG XL": 1.0, "AVIF": 2.0, "GIF": 6.0}


@cache
def rgb8() -> np.ndarray:
    """uint8[203, 301, 3]."""
    return np.asarray(picture())


@cache
def grey8() -> np.ndarray:
    """uint8[203, 301, 1]."""
    return np.asarray(picture().convert("L"))[..., None]


def deep(pixels: np.ndarray) -> np.ndarray:
    """The same picture with 16 bits."""
    return pixels.astype(np.uint16) * 257


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    """With a channel of transparency that changes from left to right."""
    top = np.iinfo(pixels.dtype).max
    alpha = np.linspace(1, top, pixels.shape[1]).astype(pixels.dtype)
    return np.concatenate([pixels, np.broadcast_to(alpha[:, None], (*pixels.shape[:2], 1))], axis=2)


def npy(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    if pixels.shape[-1] == 1 and options.get("planarconfig") != "separate":
        pixels = pixels[..., 0]
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def alpha_tiff(pixels: np.ndarray, photometric: str) -> bytes:
    return tiff(with_alpha(pixels), photometric=photometric, extrasamples=["unassalpha"])


def with_alpha_box(jp2: bytes, alpha: int) -> bytes:
    """A JP2 file with a box that calls channel number `alpha` alpha."""
    at = jp2.index(b"jp2h") - 4
    size = int.from_bytes(jp2[at : at + 4], "big")
    channels = [struct.pack(">HHH", i, int(i == alpha), 0 if i == alpha else i + 1) for i in range(alpha + 1)]
    box = b"cdef" + struct.pack(">H", len(channels)) + b"".join(channels)
    box = struct.pack(">I", len(box) + 4) + box
    return jp2[:at] + struct.pack(">I", size + len(box)) + jp2[at + 4 : at + size] + box + jp2[at + size :]


@cache
def files() -> dict[tuple[str, str], bytes]:
    """(format, kind) → a file. Kinds: RGB, grey, RGB alpha, grey alpha, RGB 16-bit, grey 16-bit and others."""
    rgb, grey = rgb8(), grey8()
    image = picture()
    transparent = picture()
    transparent.putalpha(transparent.convert("L"))

    def jp2(pixels: np.ndarray, **options: object) -> bytes:
        return imagecodecs.jpeg2k_encode(pixels.squeeze(), **options)

    def avif(pixels: np.ndarray, **options: object) -> bytes:
        return imagecodecs.avif_encode(pixels.squeeze(), level=95, **options)

    def jxl(pixels: np.ndarray, **options: object) -> bytes:
        return imagecodecs.jpegxl_encode(pixels.squeeze(), lossless=True, **options)

    return {
        ("JPEG", "RGB"): saved(image, "JPEG", quality=98, subsampling=0),
        ("JPEG", "grey"): saved(image.convert("L"), "JPEG", quality=98),
        ("PNG", "RGB"): png(rgb),
        ("PNG", "grey"): png(grey),
        ("PNG", "RGB alpha"): png(with_alpha(rgb)),
        ("PNG", "grey alpha"): png(with_alpha(grey)),
        ("PNG", "RGB 16-bit"): png(deep(rgb)),
        ("PNG", "grey 16-bit"): png(deep(grey)),
        ("PNG", "RGB alpha 16-bit"): png(with_alpha(deep(rgb))),
        ("PNG", "grey alpha 16-bit"): png(with_alpha(deep(grey))),
        ("WebP", "RGB"): imagecodecs.webp_encode(rgb, lossless=True),
        ("WebP", "RGB alpha"): imagecodecs.webp_encode(with_alpha(rgb), lossless=True),
        ("TIFF", "RGB"): tiff(rgb, photometric="rgb"),
        ("TIFF", "grey"): tiff(grey),
        ("TIFF", "RGB alpha"): alpha_tiff(rgb, "rgb"),
        ("TIFF", "grey alpha"): alpha_tiff(grey, "minisblack"),
        ("TIFF", "RGB 16-bit"): tiff(deep(rgb), photometric="rgb"),
        ("TIFF", "grey 16-bit"): tiff(deep(grey)),
        ("TIFF", "RGB alpha 16-bit"): alpha_tiff(deep(rgb), "rgb"),
        ("TIFF", "RGB in tiles"): tiff(rgb, photometric="rgb", tile=(64, 48)),
        ("TIFF", "RGB in planes"): tiff(rgb.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        ("TIFF", "RGB big-endian"): tiff(rgb, photometric="rgb", byteorder=">"),
        ("TIFF", "RGB BigTIFF"): tiff(rgb, photometric="rgb", bigtiff=True),
        **{
            ("TIFF", f"RGB {name}"): tiff(rgb, photometric="rgb", compression=name, predictor=True)
            for name in ("lzw", "deflate", "zstd")
        },
        ("TIFF", "RGB packbits"): tiff(rgb, photometric="rgb", compression="packbits"),
        ("TIFF", "grey inverted"): tiff(255 - grey, photometric="miniswhite"),
        ("TIFF", "grey 16-bit inverted"): tiff(65535 - deep(grey), photometric="miniswhite"),
        ("BMP", "RGB"): saved(image, "BMP"),
        ("BMP", "grey"): saved(image.convert("L"), "BMP"),
        ("BMP", "RGB alpha"): saved(transparent, "BMP"),
        ("GIF", "RGB"): saved(image, "GIF"),
        ("JPEG 2000", "RGB"): jp2(rgb),
        ("JPEG 2000", "grey"): jp2(grey),
        ("JPEG 2000", "RGB alpha"): with_alpha_box(jp2(with_alpha(rgb)), 3),
        ("JPEG 2000", "grey alpha"): with_alpha_box(jp2(with_alpha(grey)), 1),
        ("JPEG 2000", "RGB 16-bit"): jp2(deep(rgb)),
        ("JPEG 2000", "grey 16-bit"): jp2(deep(grey)),
        ("JPEG 2000", "RGB code stream"): jp2(rgb, codecformat="j2k"),
        ("AVIF", "RGB"): avif(rgb),
        ("AVIF", "grey"): avif(grey),
        ("AVIF", "RGB alpha"): avif(with_alpha(rgb)),
        ("AVIF", "RGB 10-bit"): avif(deep(rgb) >> 6, bitspersample=10),
        ("AVIF", "grey 12-bit"): avif(deep(grey) >> 4, bitspersample=12),
        ("JPEG 2000", "RGB 12-bit"): jp2(deep(rgb) >> 4, bitspersample=12),
        ("JPEG XL", "RGB"): jxl(rgb),
        ("JPEG XL", "RGB 12-bit"): jxl(deep(rgb) >> 4, bitspersample=12),
        ("JPEG XL", "RGB lossy"): imagecodecs.jpegxl_encode(rgb, level=99),
        ("JPEG XL", "grey"): jxl(grey),
        ("JPEG XL", "RGB alpha"): jxl(with_alpha(rgb)),
        ("JPEG XL", "grey alpha"): jxl(with_alpha(grey)),
        ("JPEG XL", "RGB 16-bit"): jxl(deep(rgb)),
        ("JPEG XL", "grey 16-bit"): jxl(deep(grey)),
        ("JPEG XL", "RGB in a container"): jxl(rgb, usecontainer=True),
        ("npy", "RGB"): npy(rgb),
        ("npy", "grey"): npy(grey[..., 0]),
        ("npy", "RGB 16-bit"): npy(deep(rgb)),
        ("npy", "grey 16-bit"): npy(deep(grey)),
        ("npy", "RGB Fortran order"): npy(np.asfortranarray(rgb)),
        ("npy", "RGB 16-bit big-endian"): npy(deep(rgb).astype(">u2")),
    }
