"""Decode on the CPU in threads that release the GIL: JPEG with `jpeg_crop.c`, all else with Pillow (or pillow-simd).

Where `jpeg_crop` is not built, Pillow decodes JPEG too: the same pixels, more slowly.
"""

import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline.decode.decoder import Decoded, Encoded, Size, unsupported_format
from pipeline.errors import why_undecodable
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
    """

    def __init__(self, size: Size, threads: int, pinned: bool = False) -> None:
        self.size = size
        self.pinned = pinned
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        batch = torch.empty((len(encoded), 3, *self.size), dtype=torch.uint8, pin_memory=self.pinned)
        images = batch.numpy()
        bad: dict[int, str] = {}
        tasks = list(zip(encoded, boxes.tolist(), flips.tolist(), images, strict=True))
        positions = iter(range(len(tasks)))

        def work() -> StageTimes:
            decode_s = resize_s = 0.0
            for i in positions:  # shared: each thread takes the next image
                data, (y, x, h, w), flip, out = tasks[i]
                try:
                    seconds = jpeg_crop and jpeg_crop.crop(data, y, x, h, w, flip, out.data)
                    seconds = seconds or decode_with_pillow(data, (y, x, h, w), flip, out)
                    decode_s, resize_s = decode_s + seconds[0], resize_s + seconds[1]
                except Exception as error:  # Pillow raises nearly any exception on damaged files
                    out[:] = 0
                    bad[i] = why_undecodable(error)
            return StageTimes(decode=decode_s, resize=resize_s)

        futures = [self.pool.submit(work) for _ in range(self.threads)]
        stage_times = sum((future.result() for future in futures), StageTimes())
        return Decoded(batch, bad, stage_times)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def decode_with_pillow(
    data: Encoded, box: tuple[int, int, int, int], flip: bool, out: npt.NDArray[np.uint8]
) -> tuple[float, float]:
    """Decode the box (y, x, height, width) of an image, resize and flip it, and write it to `out`, uint8[3, h, w].

    Returns the seconds spent on decoding and on resizing. Raises ValueError, or whatever Pillow raises, if the image is
    damaged, unsupported or smaller than its box.
    """
    begin = time.perf_counter()
    y, x, height, width = box
    if reason := unsupported_format(data):
        raise ValueError(reason)
    with Image.open(io.BytesIO(data)) as image:
        if x + width > image.width or y + height > image.height:
            raise ValueError(f"the image is {image.width} × {image.height}, smaller than its crop")
        # Crop before resizing: `resize(box=…)` would let the filter see pixels outside the crop.
        crop = image.crop((x, y, x + width, y + height))
    if crop.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip most values to white
        crop = Image.fromarray((np.asarray(crop) >> 8).astype(np.uint8))
    crop = crop.convert("RGB")
    decoded = time.perf_counter()
    crop = crop.resize(out.shape[:0:-1], Image.Resampling.BICUBIC)  # Pillow's sizes are (width, height)
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out[:] = np.asarray(crop).transpose(2, 0, 1)
    return decoded - begin, time.perf_counter() - decoded
