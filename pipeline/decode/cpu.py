"""Decode on the CPU in threads, without the GIL: JPEGs by `jpeg_crop.c`, all else by Pillow (or pillow-simd).

Where `jpeg_crop` was not built Pillow decodes the JPEGs too: the same pixels, more slowly.
"""

import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline.decode import Decoded, Encoded, Size, refused
from pipeline.errors import why_undecodable
from pipeline.spent import Spent

try:
    from pipeline.decode import jpeg_crop
except ImportError:
    jpeg_crop = None  # type: ignore[assignment]


class CpuDecoder:
    """See `pipeline.decode.Decoder`. `pinned`: images are in memory from which a GPU takes them by itself."""

    def __init__(self, size: Size, threads: int, pinned: bool = False) -> None:
        self.size = size
        self.pinned = pinned
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        made = torch.empty((len(encoded), 3, *self.size), dtype=torch.uint8, pin_memory=self.pinned)
        images = made.numpy()
        bad: dict[int, str] = {}
        tasks = list(zip(encoded, boxes.tolist(), flips.tolist(), images, strict=True))
        places = iter(range(len(tasks)))

        def work() -> Spent:
            decode_s = resize_s = 0.0
            for i in places:  # shared: each thread takes the next one
                data, (y, x, h, w), flip, out = tasks[i]
                try:
                    seconds = jpeg_crop and jpeg_crop.crop(data, y, x, h, w, flip, out.data)
                    seconds = seconds or decode_with_pillow(data, (y, x, h, w), flip, out)
                    decode_s, resize_s = decode_s + seconds[0], resize_s + seconds[1]
                except Exception as error:  # damaged bytes make Pillow raise nearly anything
                    out[:] = 0
                    bad[i] = why_undecodable(error)
            return Spent(decode=decode_s, resize=resize_s)

        working = [self.pool.submit(work) for _ in range(self.threads)]
        spent = sum((thread.result() for thread in working), Spent())
        return Decoded(made, bad, spent)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def decode_with_pillow(
    data: Encoded, box: tuple[int, int, int, int], flip: bool, out: npt.NDArray[np.uint8]
) -> tuple[float, float]:
    """The box (y, x, height, width) of an image into `out`, uint8[3, h, w].

    Returns seconds that went into decoding it, and into resizing it."""
    begin = time.perf_counter()
    y, x, height, width = box
    if reason := refused(data):
        raise ValueError(reason)
    with Image.open(io.BytesIO(data)) as image:
        if x + width > image.width or y + height > image.height:
            raise ValueError(f"it is {image.width} × {image.height}, smaller than its crop")
        # Crop before resizing: `resize(box=…)` would let the filter see pixels outside the crop.
        crop = image.crop((x, y, x + width, y + height))
    if crop.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips it to white
        crop = Image.fromarray((np.asarray(crop) >> 8).astype(np.uint8))
    crop = crop.convert("RGB")
    decoded = time.perf_counter()
    crop = crop.resize(out.shape[:0:-1], Image.Resampling.BICUBIC)  # its sizes are (width, height)
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out[:] = np.asarray(crop).transpose(2, 0, 1)
    return decoded - begin, time.perf_counter() - decoded
