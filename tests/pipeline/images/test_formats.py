"""Every format gives the picture's pixels, and its header tells the same type."""

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.images.formats import image_format, image_info, read_pixels
from tests.support.data.formats import LOSS, files, grey8, npy, rgb8, tiff
from tests.support.data.odd_images import picture, png, saved


def info_of(data: bytes):
    return image_info(lambda at, size: data[at : at + size], len(data))


@pytest.mark.parametrize(("format", "kind"), files())
def test_pixels_and_header_agree_in_every_format(format: str, kind: str) -> None:
    data = files()[format, kind]
    assert image_format(data) == format
    pixels, info = read_pixels(data), info_of(data)
    expected = grey8() if kind.startswith("grey") else rgb8()
    assert (info.format, info.width, info.height) == (format, 301, 203)
    assert pixels.shape == (203, 301, info.channels) == expected.shape
    assert pixels.dtype == info.dtype == ("uint16" if "-bit" in kind else "uint8")
    assert info.bits == {"uint8": 8, "uint16": 16}[info.dtype] or f"{info.bits}-bit" in kind
    assert ("alpha" in info.note) == ("alpha" in kind) or format == "BMP"  # whose fourth byte is often unused
    scale = 255 / (2**info.bits - 1)
    assert abs(pixels * scale - expected).mean() <= (
        1.0 if "1" in kind and info.bits != 16 else 0
    ) + LOSS.get(format, 0.0)
    assert (read_pixels(memoryview(b"xx" + data)[2:]) == pixels).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int16, np.int32, np.uint32])
@pytest.mark.parametrize("write", [npy, tiff])
def test_other_types_become_floats(write, dtype: type) -> None:
    pixels = (np.arange(5 * 7 * 12).reshape(5, 7, 12) - (0 if dtype == np.uint32 else 50)).astype(dtype)
    data = write(pixels) if write is npy else tiff(pixels, photometric="minisblack", planarconfig="contig")
    read, info = read_pixels(data), info_of(data)
    assert (info.dtype, info.channels, info.width, info.height) == ("float32", 12, 7, 5)
    assert read.dtype == np.float32
    assert (read == pixels).all()


@pytest.mark.parametrize("options", [{}, {"tile": (16, 32)}, {"compression": "deflate"}, {"planes": True}])
def test_a_tiff_with_12_bands_keeps_them(options: dict) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (50, 70, 12), np.uint16)
    if options.pop("planes", False):
        data = tiff(pixels.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate")
    else:
        data = tiff(pixels, photometric="minisblack", planarconfig="contig", **options)
    assert (read_pixels(data) == pixels).all()
    info = info_of(data)
    assert (info.width, info.height, info.channels, info.dtype, info.bits) == (70, 50, 12, "uint16", 16)


def test_of_several_pages_the_first_is_read_and_the_header_says_so() -> None:
    pages = np.stack([rgb8(), 255 - rgb8(), rgb8()])
    data = tiff(pages, photometric="rgb")
    assert info_of(data).note == "other pages"
    assert (read_pixels(data) == rgb8()).all()
    frames = [Image.fromarray(page) for page in pages]
    gif = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert abs(read_pixels(gif).astype(float) - rgb8()).mean() < LOSS["GIF"]


def webp_chunk(kind: bytes, content: bytes) -> bytes:
    return kind + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) & 1)


def animated_webp(frames: list[np.ndarray]) -> bytes:
    height, width = frames[0].shape[:2]
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = [webp_chunk(b"VP8X", bytes([2, 0, 0, 0]) + size), webp_chunk(b"ANIM", bytes(6))]
    for frame in frames:
        still = imagecodecs.webp_encode(frame, lossless=True)[12:]
        chunks.append(webp_chunk(b"ANMF", bytes(6) + size + bytes([100, 0, 0, 0]) + still))
    return webp_chunk(b"RIFF", b"WEBP" + b"".join(chunks))


@pytest.mark.parametrize("format", ["AVIF", "JPEG XL", "WebP"])
def test_of_an_animation_the_first_frame_is_read(format: str) -> None:
    frames = np.stack([rgb8(), 255 - rgb8(), rgb8()])
    data = {
        "AVIF": lambda: imagecodecs.avif_encode(frames, level=95),
        "JPEG XL": lambda: imagecodecs.jpegxl_encode(frames, lossless=True),
        "WebP": lambda: animated_webp(list(frames)),
    }[format]()
    info = info_of(data)
    assert (info.format, info.width, info.height, info.channels) == (format, 301, 203, 3)
    assert abs(read_pixels(data).astype(float) - rgb8()).mean() <= LOSS.get(format, 0.0)


def test_a_tiff_says_how_many_bits_are_used() -> None:
    deep = rgb8().astype(np.uint16) << 4
    data = tiff(deep, photometric="rgb", extratags=[(281, 3, 3, (4095, 4095, 4095), True)])
    assert info_of(data).bits == 12


def test_palettes_cmyk_and_one_bit_tiffs_become_rgb_or_grey() -> None:
    image = picture()
    palette = image.quantize(256)
    colours = np.array(palette.getpalette(), np.uint16).reshape(-1, 3).T * 257
    colours = np.pad(colours, ((0, 0), (0, 256 - colours.shape[1])))
    data = tiff(np.asarray(palette), photometric="palette", colormap=colours)
    assert (read_pixels(data) == np.asarray(palette.convert("RGB"))).all()
    cmyk = image.convert("CMYK")
    data = tiff(np.asarray(cmyk), photometric="separated")
    assert (read_pixels(data) == np.asarray(cmyk.convert("RGB"))).all()
    bits = np.asarray(image.convert("1"))
    data = tiff(bits, photometric="minisblack")
    assert (read_pixels(data)[..., 0] == bits * 255).all()
    assert info_of(data).dtype == "uint8"
    assert info_of(data).channels == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"GIF8 or what", "not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (npy(np.zeros((3, 224, 224))), r"looks like \[channels, height, width\]"),
        (npy(np.zeros(768)), "768, not"),
        (npy(np.zeros((4, 4), complex)), "complex128"),
        (npy(np.zeros((0, 4))), "4 × 0 pixels"),
        (tiff(rgb8(), photometric="rgb")[:-5000], ""),
        (files()["WebP", "RGB"][:-900], ""),
        (files()["AVIF", "RGB"][:-900], ""),
        (files()["JPEG XL", "RGB"][:-900], ""),
    ],
)
def test_what_cannot_be_read_is_a_value_error_with_a_reason(data: bytes, reason: str) -> None:
    def read() -> None:
        info_of(data)
        read_pixels(data)

    with pytest.raises(Exception, match=reason or ".") as caught:
        read()
    assert str(caught.value)


def test_a_header_far_behind_the_first_bytes_is_found_without_reading_the_image() -> None:
    pixels = np.zeros((2000, 2000, 3), np.uint8)
    data = tiff(pixels, photometric="rgb")
    moved = bytearray(data)
    with tifffile.TiffFile(__import__("io").BytesIO(data)) as file:
        at, size = file.pages.first.offset, 400
    moved[4:8] = len(data).to_bytes(4, "little")  # the directory at the end, as many programs write it
    moved += data[at : at + size]
    reads: list[int] = []

    def read(offset: int, count: int) -> bytes:
        reads.append(count)
        return bytes(moved[offset : offset + count])

    assert image_info(read, len(moved)).width == 2000
    assert sum(reads) < 300_000


def test_floats_and_bands_of_jpeg_xl_and_jpeg_2000() -> None:
    values = np.random.default_rng(0).random((20, 30, 3), np.float32)
    data = imagecodecs.jpegxl_encode(values, lossless=True)
    assert (read_pixels(data) == values).all()
    assert (info_of(data).dtype, info_of(data).channels) == ("float32", 3)
    bands = np.random.default_rng(0).integers(0, 65536, (64, 80, 5), np.uint16)
    data = imagecodecs.jpeg2k_encode(bands)
    assert (read_pixels(data) == bands).all()
    assert (info_of(data).dtype, info_of(data).channels) == ("uint16", 5)


def test_png_of_16_bits_keeps_them() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (9, 8, 3), np.uint16)
    assert (read_pixels(png(deep)) == deep).all()
