"""Decode on the CPU in threads, without the GIL: JPEGs by `jpeg_crop.c`, all else by Pillow (or pillow-simd).

Where `jpeg_crop` was not built Pillow decodes the JPEGs too: the same pixels, more slowly.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline.decode import Decoded, Encoded, refused
from pipeline.errors import why_undecodable

try:
    from pipeline.decode import jpeg_crop
except ImportError:
    jpeg_crop = None  # type: ignore[assignment]


class CpuDecoder:
    """See `pipeline.decode.Decoder`."""

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        images = np.zeros((len(encoded), 3, self.size, self.size), np.uint8)
        bad: dict[int, str] = {}
        tasks = list(zip(encoded, boxes.tolist(), flips.tolist(), images, strict=True))
        places = iter(range(len(tasks)))

        def work() -> None:
            for i in places:  # shared: each thread takes the next one
                data, (y, x, h, w), flip, out = tasks[i]
                try:
                    if jpeg_crop is None or not jpeg_crop.crop(data, y, x, h, w, flip, out.data):
                        decode_with_pillow(data, (y, x, h, w), flip, out)
                except Exception as error:  # damaged bytes make Pillow raise nearly anything
                    out[:] = 0
                    bad[i] = why_undecodable(error)

        for working in [self.pool.submit(work) for _ in range(self.threads)]:
            working.result()
        return Decoded(torch.from_numpy(images), bad)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def decode_with_pillow(
    data: Encoded, box: tuple[int, int, int, int], flip: bool, out: npt.NDArray[np.uint8]
) -> None:
    """The box (y, x, height, width) of an image into `out`, uint8[3, size, size]."""
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
    crop = crop.convert("RGB").resize(out.shape[1:], Image.Resampling.BICUBIC)
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out[:] = np.asarray(crop).transpose(2, 0, 1)
