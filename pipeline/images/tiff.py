"""Read and write TIFF images. They are read of any kind: tiles or strips, planar or interleaved, compressed or not, any number of bands.

The first page is read, and any page by `extract_page`. tifffile leaves colours as they are stored (except in JPEG compression), so palettes, inverted
greys, CMYK and YCbCr are converted here.
"""

import io
import itertools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC

from pipeline.images.pixels import Dtype
from pipeline.text import plural

MAX_SAMPLE_VALUE = 281  # the tag
JPEG = {COMPRESSION.JPEG, COMPRESSION.OJPEG, COMPRESSION.ALT_JPEG}
# How colours are stored → Pillow's name, for those that Pillow converts to RGB.
CONVERTED = {PHOTOMETRIC.SEPARATED: "CMYK", PHOTOMETRIC.YCBCR: "YCbCr"}
GREY = {PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK}
Array = npt.NDArray[Any]
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what it also raises


class _RangeFile(io.RawIOBase):
    """A file of which only the ranges that are needed are read."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self.read_range, self.size, self.at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = self.read_range(self.at, max(min(len(buffer), self.size - self.at), 0))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def tiff_info(read: Callable[[int, int], bytes], size: int) -> tuple[int, int, int, Dtype, int, str]:
    """Width and height in pixels, channels, dtype, significant bits and note of the first page: see `ImageInfo`.

    Args:
        read: called with an offset and a number of bytes, returns these bytes of the file.
        size: of the file in bytes.
    """
    with tifffile.TiffFile(io.BufferedReader(_RangeFile(read, size), 1 << 16)) as file:
        page = _page(file)
        alpha = _alpha_bands(page)
        note = ["alpha"] if alpha else []
        # The pages behind a large image may be smaller copies of it.
        if any(not other.is_reduced for other in itertools.islice(file.pages, 1, 3)):
            note.append("other pages")
        dtype, bits = _dtype(page)
        channels = 3 if _becomes_rgb(page) else page.samplesperpixel - len(alpha)
        return page.imagewidth, page.imagelength, channels, dtype, bits, ", ".join(note)


def extract_page(data: bytes, number: int) -> bytes:
    """Page `number`, counted from 1, as a TIFF of its own. ValueError if there is no such page."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if number > len(file.pages):
            raise ValueError(f"there is no page {number}: the TIFF has {plural(len(file.pages), 'page')}")
        page: Any = file.pages[number - 1]
        dtype, bits = _dtype(page)
    pixels = read_tiff(data, number)
    return write_tiff(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels.astype(dtype), bits)


def read_tiff(data: bytes | memoryview, number: int = 1) -> Array:
    """The pixels of a page, counted from 1: [height, width, channels], of the stored dtype, without alpha."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = _page(file, number)
        pixels = page.asarray(maxworkers=1)
        pixels = np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else pixels.reshape(*pixels.shape[:2], -1)
        bits, photometric = page.bitspersample, page.photometric
        if photometric == PHOTOMETRIC.PALETTE:
            return (page.colormap[:, pixels[..., 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
        if bits < 8 and pixels.dtype != bool:
            pixels = pixels * np.uint8(255 // ((1 << bits) - 1))
        if photometric == PHOTOMETRIC.MINISWHITE:
            pixels = _inverted(pixels, bits)
        alpha = _alpha_bands(page)
        pixels = np.delete(pixels, alpha, axis=2) if alpha else pixels
        if _becomes_rgb(page):
            if pixels.dtype == np.uint16:
                pixels = (pixels >> (bits - 8)).astype(np.uint8)
            mode = CONVERTED[photometric]
            bands = pixels[..., : len(mode) if mode == "CMYK" else 3]
            return np.asarray(Image.fromarray(np.ascontiguousarray(bands), mode).convert("RGB"))
        return pixels


def write_tiff(pixels: Array, bits: int) -> bytes:
    """A compressed TIFF of [height, width, channels] with `bits` significant bits. Always the same bytes."""
    channels = pixels.shape[2]
    top = [(MAX_SAMPLE_VALUE, "H", channels, ((1 << bits) - 1,) * channels, True)]
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        pixels if channels > 1 else pixels[..., 0],
        photometric="rgb" if channels == 3 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        compression="deflate",
        predictor=True,
        metadata=None,
        software=False,
        extratags=top if pixels.dtype == np.uint16 and bits < 16 else [],
    )
    return file.getvalue()


def _page(file: tifffile.TiffFile, number: int = 1) -> Any:
    page: Any = file.pages[number - 1]
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"a TIFF with the axes {page.axes} is not an image")
    if page.photometric not in {PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE, *GREY, *CONVERTED}:
        raise ValueError(f"TIFF colours of the kind {page.photometric.name} are not supported")
    return page


def _becomes_rgb(page: Any) -> bool:
    """Whether colours are converted to 8-bit RGB."""
    if page.photometric == PHOTOMETRIC.YCBCR:
        return page.compression not in JPEG  # tifffile converts these
    return page.photometric in (PHOTOMETRIC.PALETTE, PHOTOMETRIC.SEPARATED)


def _alpha_bands(page: Any) -> list[int]:
    """The numbers of the bands that are alpha."""
    extra = tuple(page.extrasamples or ())
    first = page.samplesperpixel - len(extra)
    return [
        first + i for i, kind in enumerate(extra) if kind in (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
    ]


def _inverted(pixels: Array, bits: int) -> Array:
    if pixels.dtype == bool:
        return ~pixels
    if pixels.dtype.kind != "u":
        return -pixels if pixels.dtype.kind == "i" else 1 - pixels
    top = (1 << bits) - 1 if bits > 8 else 255
    return (top - pixels).astype(pixels.dtype)


def _dtype(page: Any) -> tuple[Dtype, int]:
    """The dtype that the page is read as, and the significant bits of its values."""
    dtype, bits = page.dtype, page.bitspersample
    if dtype is None or dtype.kind not in "iufb":
        raise ValueError(f"TIFF values of {bits} bits and type {dtype} are not supported")
    if _becomes_rgb(page) or dtype.kind == "b" or (dtype.kind == "u" and dtype.itemsize == 1):
        return "uint8", 8
    if dtype.kind != "u" or dtype.itemsize != 2:
        return "float32", 32
    tag = page.tags.get(MAX_SAMPLE_VALUE)
    top = max(np.atleast_1d(tag.value)) if tag else 0
    return "uint16", int(top).bit_length() if 255 < top < 1 << bits else bits
