"""The interface of all decoders, and its types."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

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

    images: torch.Tensor  # uint8[n, 3, h, w], RGB; bad images are zeros
    bad: dict[int, str]  # position of a bad image in the batch → why it cannot be decoded
    stage_times: StageTimes  # thread-seconds for the good images


class Decoder(Protocol):
    """Decodes crops of one size."""

    size: Size

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        """Decode a batch: crop, resize (bicubic with antialiasing) and flip each image. Safe to call from several
        threads at once.

        Args:
            encoded: n JPEG or PNG files.
            boxes: int64[n, 4], the crops (y, x, height, width) in pixels of the stored image. EXIF orientation is
                ignored.
            flips: bool[n], whether to mirror each crop left to right.
        """
        ...

    def close(self) -> None:
        """Release threads and memory. No call may be in progress."""
        ...


def unsupported_format(encoded: Encoded) -> str | None:
    """Why no decoder accepts this file, judged by its first bytes; None for JPEG and PNG."""
    head = bytes(encoded[:8])
    return None if head[:3] == b"\xff\xd8\xff" or head == b"\x89PNG\r\n\x1a\n" else "not a JPEG or PNG"
