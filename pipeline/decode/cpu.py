"""Decode on the CPU in threads that release the GIL: JPEG with `jpeg_crop.c`, PNG with Pillow (or pillow-simd), and all
other formats and types as `pipeline.images` reads them.

Where `jpeg_crop` is not built, Pillow decodes JPEG too: the same pixels, more slowly.
"""

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.decode.batch_memory import BatchMemory
from pipeline.decode.decoder import Decoded, Encoded, Size, torch_dtype
from pipeline.errors import why_undecodable
from pipeline.images.convert import convert, png_has_sbit, significant_bits, to_grey
from pipeline.images.formats import check_size, image_format, read_pixels
from pipeline.images.pixels import RGB, Pixels
from pipeline.stage_times import StageTimes

try:
    from pipeline.decode import jpeg_crop
except ImportError:
    jpeg_crop = None  # type: ignore[assignment]


class CpuDecoder:
    """A `Decoder` on the CPU.

    Args:
        size: (height, width) of the crops, pixels.
        threads: number of decoding threads.
        pinned: allocate the images in page-locked memory, so that they can be copied to a GPU asynchronously.
        pixels: type of the batches.
    """

    def __init__(self, size: Size, threads: int, pinned: bool = False, pixels: Pixels = RGB) -> None:
        self.size = size
        self.pixels = pixels
        self.pinned = pinned
        self.threads = threads
        self.memory = BatchMemory()
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        shape, dtype = (len(encoded), self.pixels.channels, *self.size), torch_dtype(self.pixels)
        # torch itself uses page-locked memory again.
        batch = (
            torch.empty(shape, dtype=dtype, pin_memory=True)
            if self.pinned
            else self.memory.empty(shape, dtype)
        )
        images = batch.numpy()
        decode = _decoding(self.pixels)
        bad: dict[int, str] = {}
        tasks = list(zip(encoded, boxes.tolist(), flips.tolist(), images, strict=True))
        positions = iter(range(len(tasks)))

        def work() -> StageTimes:
            decode_s = resize_s = 0.0
            for i in positions:  # shared: each thread takes the next image
                try:
                    seconds = decode(*tasks[i])
                    decode_s, resize_s = decode_s + seconds[0], resize_s + seconds[1]
                except Exception as error:  # Pillow raises nearly any exception on damaged files
                    images[i] = 0
                    bad[i] = why_undecodable(error)
            return StageTimes(decode=decode_s, resize=resize_s)

        futures = [self.pool.submit(work) for _ in range(self.threads)]
        stage_times = sum((future.result() for future in futures), StageTimes())
        return Decoded(batch, bad, stage_times)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


Box = tuple[int, int, int, int]  # (y, x, height, width) in pixels
Out = npt.NDArray[Any]  # [channels, height, width]


def _decoding(pixels: Pixels) -> Callable[[Encoded, Box, bool, Out], tuple[float, float]]:
    """The function that decodes one image to these pixels. Arguments and result: see `decode_with_pillow`."""
    if (pixels.channels, pixels.dtype) == (3, "uint8"):
        return lambda data, box, flip, out: _decode_rgb(data, box, flip, out, pixels)
    if (pixels.channels, pixels.dtype) == (1, "uint8"):
        return lambda data, box, flip, out: _decode_grey(data, box, flip, out, pixels)
    return lambda data, box, flip, out: _decode_any(data, box, flip, out, pixels)


def _decode_rgb(data: Encoded, box: Box, flip: bool, out: Out, pixels: Pixels) -> tuple[float, float]:
    seconds = jpeg_crop and jpeg_crop.crop(data, *box, flip, out.data)  # None if it is no JPEG
    if seconds:
        return seconds
    if decodes_as_rgb(data, pixels):
        return decode_with_pillow(data, box, flip, out)
    return _decode_any(data, box, flip, out, pixels)


def _decode_grey(data: Encoded, box: Box, flip: bool, out: Out, pixels: Pixels) -> tuple[float, float]:
    if not decodes_as_rgb(data, pixels):
        return _decode_any(data, box, flip, out, pixels)
    rgb = np.empty((3, *out.shape[1:]), np.uint8)
    seconds = _decode_rgb(data, box, flip, rgb, pixels)
    out[0] = to_grey(rgb.transpose(1, 2, 0))[..., 0]
    return seconds


def decodes_as_rgb(data: Encoded, pixels: Pixels) -> bool:
    """Whether this is a JPEG or PNG of which decoders make 8-bit RGB by themselves, with the right brightness."""
    if image_format(data) == "PNG":
        is_deep = len(data) > 24 and data[24] == 16
        return not (is_deep and (pixels.bits != 16 or png_has_sbit(data)))
    return image_format(data) == "JPEG"


def decode_with_pillow(
    data: Encoded, box: Box, flip: bool, out: npt.NDArray[np.uint8]
) -> tuple[float, float]:
    """Decode the box of a JPEG or PNG, resize and flip it, and write it to `out`, uint8[3, h, w].

    Returns the seconds spent on decoding and on resizing. Raises ValueError, or whatever Pillow raises, if the image is
    damaged, unsupported or smaller than its box.
    """
    begin = time.perf_counter()
    y, x, height, width = box
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        check_size(*image.size)
        _check_box(box, image.height, image.width)
        # Crop before resizing: `resize(box=…)` would let the filter see pixels outside the crop.
        crop = image.crop((x, y, x + width, y + height))
    if crop.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip most values to white
        crop = Image.fromarray((np.asarray(crop) >> 8).astype(np.uint8))
    crop = crop.convert("RGB")
    decoded = time.perf_counter()
    _resize_with_pillow(crop, flip, out)
    return decoded - begin, time.perf_counter() - decoded


def _decode_any(data: Encoded, box: Box, flip: bool, out: Out, pixels: Pixels) -> tuple[float, float]:
    """The same for an image of any format, and an `out` of any type of pixels."""
    begin = time.perf_counter()
    y, x, height, width = box
    image = read_pixels(data)
    _check_box(box, *image.shape[:2])
    bits = significant_bits(data, image, pixels.bits)
    crop = convert(image[y : y + height, x : x + width], bits, pixels)
    decoded = time.perf_counter()
    if (pixels.channels, pixels.dtype) == (3, "uint8"):
        _resize_with_pillow(Image.fromarray(crop), flip, out)
    else:
        planes = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1), np.float32))
        resized = F.interpolate(planes[None], out.shape[1:], mode="bicubic", antialias=True)[0].numpy()
        if pixels.dtype != "float32":
            resized = np.rint(resized).clip(0, np.iinfo(out.dtype).max)
        out[:] = resized[..., ::-1] if flip else resized
    return decoded - begin, time.perf_counter() - decoded


def _check_box(box: Box, height: int, width: int) -> None:
    if box[1] + box[3] > width or box[0] + box[2] > height:
        raise ValueError(f"the image is {width} × {height}, smaller than its crop")


def _resize_with_pillow(crop: Image.Image, flip: bool, out: npt.NDArray[np.uint8]) -> None:
    crop = crop.resize(out.shape[:0:-1], Image.Resampling.BICUBIC)  # Pillow's sizes are (width, height)
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out[:] = np.asarray(crop).transpose(2, 0, 1)
