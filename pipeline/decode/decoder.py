"""The interface of all decoders, and its types."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipeline.images.pixels import Pixels
from pipeline.stage_times import StageTimes

Encoded = bytes | memoryview
Size = tuple[int, int]  # (height, width) in pixels
DecoderName = Literal["auto", "cpu", "dali"]


@dataclass(frozen=True)
class Decoded:
    """A decoded batch of n images.

    On a CUDA device `images` is complete when it is returned. Its memory was allocated on the decoder's own stream,
    so a caller that uses it on another stream calls `Tensor.record_stream`.
    """

    images: (
        torch.Tensor
    )  # [n, channels, h, w] of the decoder's `pixels`: uint8 RGB by default; bad images are zeros
    bad: dict[int, str]  # position of a bad image in the batch → why it cannot be decoded
    stage_times: StageTimes  # thread-seconds for the good images


class Decoder(Protocol):
    """Decodes crops of one size and one type of pixels."""

    size: Size
    pixels: Pixels

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        """Decode a batch: crop, resize (bicubic with antialiasing) and flip each image. Safe to call from several
        threads at once.

        Args:
            encoded: n files of any format of `pipeline.images.formats`.
            boxes: int64[n, 4], the crops (y, x, height, width) in pixels of the stored image. EXIF orientation is
                ignored.
            flips: bool[n], whether to mirror each crop left to right.
        """
        ...

    def close(self) -> None:
        """Release threads and memory. No call may be in progress."""
        ...


def torch_dtype(pixels: Pixels) -> torch.dtype:
    """The dtype of batches with these pixels."""
    return {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}[pixels.dtype]
