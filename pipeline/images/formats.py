"""Read images of all formats: their size and type from the header, and their pixels.

    JPEG, PNG, BMP, GIF                      Pillow (16-bit PNG: imagecodecs)
    WebP, JPEG 2000, AVIF, JPEG XL           imagecodecs, which has the codecs' own libraries
    TIFF                                     tifffile with imagecodecs, see `pipeline.images.tiff`
    .npy                                     numpy: [height, width] or [height, width, channels]

All formats are read alike: EXIF orientation and colour profiles are ignored; palette, 1-bit and CMYK images become RGB or
grey; alpha is dropped, not blended. A file with several images gives its first one.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import why_undecodable
from pipeline.images.headers import Header, avif_header, jpeg2000_header, jpegxl_header, webp_header
from pipeline.images.pixels import Dtype

Format = Literal["JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF", "JPEG 2000", "AVIF", "JPEG XL", "npy"]
# File extension → format. The first extension of a format is the one that is written.
EXTENSIONS: dict[str, Format] = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jfif": "JPEG",
    "jpe": "JPEG",
    "png": "PNG",
    "webp": "WebP",
    "tif": "TIFF",
    "tiff": "TIFF",
    "bmp": "BMP",
    "gif": "GIF",
    "jp2": "JPEG 2000",
    "j2k": "JPEG 2000",
    "jpx": "JPEG 2000",
    "j2c": "JPEG 2000",
    "avif": "AVIF",
    "jxl": "JPEG XL",
    "npy": "npy",
}
FORMAT_NAMES = "JPEG, PNG, WebP, TIFF, BMP, GIF, JPEG 2000, AVIF, JPEG XL or .npy"
FIRST_READ = 4 << 10  # bytes: enough for most headers; Exif data, ICC profiles and thumbnails need more
MAX_READ = 16 << 20  # of a header
MAX_PIXELS = 178_956_970  # width × height: Pillow's limit against files that would fill the memory
Image.MAX_IMAGE_PIXELS = None  # `check_size` takes its place, because `shards build` may shrink larger images
HEADER_BYTES = 1 << 20
HEADERS: dict[Format, Callable[[bytes], Header]] = {
    "WebP": webp_header,
    "JPEG 2000": jpeg2000_header,
    "AVIF": avif_header,
    "JPEG XL": jpegxl_header,
}
Read = Callable[[int, int], bytes]  # (offset, size) → these bytes of the file, fewer at its end
PILLOW = ("JPEG", "PNG", "BMP", "GIF")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ImageInfo:
    """What an image's header says."""

    format: Format
    width: int  # pixels, as stored: EXIF orientation is ignored
    height: int
    channels: int  # without alpha; 3 for palettes and CMYK
    dtype: Dtype
    bits: int  # significant bits of a value: 8; 9 to 16 for uint16, 16 also if the file does not say; 32 for floats
    note: str = ""  # what is left out of the image: "alpha", "other pages"


def image_format(head: bytes | memoryview) -> Format | None:
    """The format of a file by its first 32 bytes, or None."""
    head = bytes(head[:32])
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head[:2] == b"BM":
        return "BMP"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or head[:4] == b"\xff\x4f\xff\x51":
        return "JPEG 2000"
    if head[4:8] == b"ftyp" and (head[8:12] in (b"avif", b"avis") or b"avif" in head[16:]):
        return "AVIF"
    if head[:2] == b"\xff\x0a" or head[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        return "JPEG XL"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    return None


def image_info(read: Read, size: int) -> ImageInfo:
    """The size and type of an image, from its header, which may be anywhere in a TIFF.

    Args:
        read: called with an offset and a number of bytes, returns these bytes of the file.
        size: of the file in bytes.

    ValueError, with the reason, if it is no image of a known format, or its header is damaged.
    """
    info = any_size_info(read, size)
    check_size(info.width, info.height)
    return info


def check_size(width: int, height: int, most: int = MAX_PIXELS) -> None:
    """ValueError, which says what to do, if an image has more than `most` pixels."""
    if width * height > most:
        raise ValueError(
            f"{width} × {height} pixels are {width * height / 1e6:,.0f} megapixels, more than {most / 1e6:,.0f}: to shrink such "
            "images, use `maestream shards build` with --shorter-side or --longer-side"
        )


def any_size_info(read: Read, size: int) -> ImageInfo:
    """As `image_info`, also for images with more than MAX_PIXELS."""
    limit = min(size, MAX_READ)
    wanted = min(FIRST_READ, limit)
    while True:
        head = read(0, wanted)
        try:
            info = _info(head, read, size)
        except Exception as error:  # on incomplete or damaged bytes the libraries raise almost any exception
            if wanted == limit or (head and image_format(head) is None):
                raise ValueError(why_undecodable(error)) from error
            wanted = min(8 * wanted, limit)
        else:
            if 0 in (info.width, info.height):
                raise ValueError(f"the image has {info.width} × {info.height} pixels")
            return info


def read_pixels(data: bytes | memoryview, most: int = MAX_PIXELS) -> Array:
    """The pixels of an image: [height, width, channels] of uint8, uint16 or float32, without alpha.

    Palette, 1-bit and CMYK images become RGB or grey of 8 bits. Integers that are not of these types, and 64-bit floats,
    become float32. Values are not scaled: 12-bit images are uint16 with values below 4096. Safe to call from several
    threads at once.

    Args:
        data: the file.
        most: pixels that it may have.

    ValueError, or what the format's library raises, if the image is damaged or has no known format.
    """
    format = image_format(data)
    if format is None:
        raise ValueError(_unknown(bytes(data[:16])))
    info = any_size_info(lambda at, size: bytes(data[at : at + size]), len(data))
    check_size(info.width, info.height, most)
    pixels = _readers()[format](data)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"the image has {pixels.ndim} dimensions, not height, width and channels")
    return np.ascontiguousarray(_to_dtype(pixels))


def _readers() -> dict[Format, Callable[[Any], Array]]:  # imagecodecs takes views, which its annotations deny
    return {
        "JPEG": _read_with_pillow,
        "PNG": _read_png,
        "BMP": _read_with_pillow,
        "GIF": _read_with_pillow,
        "WebP": _read_webp,
        "TIFF": _read_tiff,
        "JPEG 2000": _read_jpeg2000,
        "AVIF": _read_avif,
        "JPEG XL": _read_jpegxl,
        "npy": _read_npy,
    }


def _unknown(head: bytes) -> str:
    if head[4:8] == b"ftyp":
        return "not an image of a known format: it may be HEIC or a video (convert it to JPEG)"
    return f"not an image: expected {FORMAT_NAMES}"


def _to_dtype(pixels: Array) -> Array:
    """The pixels as uint8, uint16 or float32. Booleans become 0 and 255."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"values of type {pixels.dtype} are not supported")
    return pixels.astype(_dtype_name(pixels.dtype), copy=False)


def _dtype_name(dtype: np.dtype[Any]) -> Dtype:
    """The type that pixels of `dtype` are read as. ValueError if there is none."""
    if dtype.kind not in "iufb":
        raise ValueError(f"values of type {dtype} are not supported")
    if dtype.kind == "b" or (dtype.kind == "u" and dtype.itemsize == 1):
        return "uint8"
    return "uint16" if dtype.kind == "u" and dtype.itemsize == 2 else "float32"


# ---- pixels -----------------------------------------------------------------------------------------------------


def _read_with_pillow(data: Any) -> Array:
    with Image.open(io.BytesIO(data), formats=PILLOW) as image:
        return np.asarray(image.convert("L" if image.mode in ("L", "LA") else "RGB"))


def _read_png(data: Any) -> Array:
    if len(data) > 25 and data[24] == 16:
        import imagecodecs

        pixels = imagecodecs.png_decode(data)
        return pixels[..., : pixels.shape[2] - (pixels.shape[2] in (2, 4))] if pixels.ndim == 3 else pixels
    return _read_with_pillow(data)


def _read_webp(data: Any) -> Array:
    import imagecodecs

    return imagecodecs.webp_decode(data, hasalpha=False)[..., :3]


def _read_tiff(data: Any) -> Array:
    from pipeline.images.tiff import read_tiff

    return read_tiff(data)


def _read_jpeg2000(data: Any) -> Array:
    import imagecodecs

    header = jpeg2000_header(bytes(data))
    pixels = imagecodecs.jpeg2k_decode(data, numthreads=1)
    return _to_8_bits(pixels[..., : header.channels] if pixels.ndim == 3 else pixels, header.bits)


def _read_avif(data: Any) -> Array:
    import imagecodecs

    # libavif decodes the still image of an animation if the file calls itself a still image. (imagecodecs crashes when it is
    # asked for one frame of several.)
    if data[8:12] == b"avis":
        data = b"".join((data[:8], b"avif", data[12:]))
    return _without_alpha(imagecodecs.avif_decode(data, numthreads=1))


def _read_jpegxl(data: Any) -> Array:
    import imagecodecs

    pixels = imagecodecs.jpegxl_decode(data, index=0, keeporientation=True, numthreads=1)
    return _to_8_bits(_without_alpha(pixels), jpegxl_header(bytes(data[:HEADER_BYTES])).bits)


def _to_8_bits(pixels: Array, bits: int) -> Array:
    """The same pixels, scaled if they have fewer than 8 bits."""
    return pixels if bits >= 8 else (pixels * (255 / ((1 << bits) - 1)) + 0.5).astype(np.uint8)


def _without_alpha(pixels: Array) -> Array:
    """The same image without alpha: the second or fourth channel of two or four."""
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        return pixels[..., :-1]
    return pixels


def _read_npy(data: Any) -> Array:
    pixels = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    _check_npy_shape(pixels.shape)
    return pixels


def _check_npy_shape(shape: tuple[int, ...]) -> None:
    """ValueError if an array cannot be an image."""
    text = " × ".join(map(str, shape))
    if len(shape) not in (2, 3):
        raise ValueError(
            f"the array's shape is {text or 'empty'}, not [height, width] or [height, width, channels]"
        )
    if len(shape) == 3 and shape[0] < 32 <= min(shape[1:]):
        raise ValueError(
            f"the array's shape {text} looks like [channels, height, width]: store it as [height, width, channels]"
        )


# ---- headers ----------------------------------------------------------------------------------------------------


def _info(head: bytes, read: Read, size: int) -> ImageInfo:
    format = image_format(head)
    if format is None:
        raise ValueError(_unknown(head))
    if format == "TIFF":
        from pipeline.images.tiff import tiff_info

        return ImageInfo("TIFF", *tiff_info(read, size))
    if format == "npy":
        return _npy_info(head)
    if format in HEADERS:
        header = HEADERS[format](head)
        bits = max(header.bits, 8)
        alpha = "alpha" if header.alpha else ""
        return ImageInfo(format, *header[:4], bits, alpha)
    return _pillow_info(format, head)


def _pillow_info(format: Format, head: bytes) -> ImageInfo:
    with Image.open(io.BytesIO(head), formats=PILLOW) as image:
        deep = format == "PNG" and head[24] == 16
        grey = image.mode in ("L", "LA") or image.mode.startswith("I")
        if deep:
            grey = head[25] in (0, 4)
        alpha = "alpha" if image.mode in ("LA", "RGBA") else ""
        return ImageInfo(
            format, *image.size, 1 if grey else 3, "uint16" if deep else "uint8", 16 if deep else 8, alpha
        )


def _npy_info(head: bytes) -> ImageInfo:
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(file)
    _check_npy_shape(shape)
    name = _dtype_name(dtype)
    bits = {"uint8": 8, "uint16": 16, "float32": 32}[name]
    return ImageInfo("npy", shape[1], shape[0], shape[2] if len(shape) == 3 else 1, name, bits)
