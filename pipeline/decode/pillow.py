"""Decode with Pillow, or pillow-simd where it is installed, in threads (decoding releases the GIL)."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline.decode import Decoded, Encoded
from pipeline.errors import why_undecodable


class PillowDecoder:
    """See `pipeline.decode.Decoder`."""

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        images = np.zeros((len(encoded), self.size, self.size, 3), np.uint8)

        def decode(i: int) -> str | None:
            try:
                images[i] = np.asarray(self._crop(encoded[i], *boxes[i].tolist(), flip=bool(flips[i])))
            except Exception as error:  # damaged bytes make Pillow raise nearly anything
                images[i] = 0
                return why_undecodable(error)
            return None

        reasons = enumerate(self.pool.map(decode, range(len(encoded))))
        bad = {i: reason for i, reason in reasons if reason is not None}
        return Decoded(torch.from_numpy(images).permute(0, 3, 1, 2), bad)

    def _crop(self, encoded: Encoded, y: int, x: int, height: int, width: int, *, flip: bool) -> Image.Image:
        with Image.open(io.BytesIO(encoded)) as image:
            if x + width > image.width or y + height > image.height:
                raise ValueError(f"it is {image.width} × {image.height}, smaller than its crop")
            # Crop before resizing: `resize(box=…)` would let the filter see pixels outside the crop.
            crop = image.crop((x, y, x + width, y + height))
        if crop.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips it to white
            crop = Image.fromarray((np.asarray(crop) >> 8).astype(np.uint8))
        crop = crop.convert("RGB")
        crop = crop.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
