"""Decode, crop, resize and flip a batch: one small interface, several executors.

Executors are handed crop boxes, so all of them produce the same crops: on JPEGs within 0.3/255 on average
of Pillow decoding, cropping and resizing the whole image (the rest is rounding; DALI resizes in floats).

What they make of images that are not plain RGB, all the same:

- JPEG and PNG alone are decoded; any other format is a bad sample. Of JPEG: baseline and progressive,
  Huffman and arithmetic, any subsampling, grey, RGB, CMYK and YCCK (Adobe's inverted ones too). 12 bits
  are a bad sample.
- EXIF orientation and colour profiles are ignored, as by ImageFolder.
- Grey, palette and 1-bit images become RGB. Transparency is dropped, not blended.
- 16 bits are scaled to 8: by their high byte, or by rounding in DALI.

Where they differ:

- Within 1/255 on average: CMYK, 1-bit and 16-bit images.
- Lossless JPEG (a medical format): DALI decodes it, the others call it bad, and so does `shards build`.
- Damage behind the last row of the crop is seen by nobody who stops there: not by DALI, nor by `cpu` in a
  JPEG. Pillow, where `jpeg_crop` is not built, reads to the end. (`shards build` and `verify` do, and each
  read is checked against the index's crc32c, so this is about bytes that were bad when indexed.)
- Wrong bits inside: libjpeg goes on after most of them, in every executor, but DALI's parser refuses some
  damaged headers that libjpeg forgives (about 5 of 1000 JPEGs with random damage).

DALI on a GPU: baseline JPEGs go to the GPU's JPEG engines and, like progressive ones, to its other cores, with
their Huffman codes read by host threads; what nvJPEG does not do (CMYK, arithmetic) and PNGs are decoded on the
host and copied. Which of them decodes an image depends on its batch, so its pixels may too, by rounding. Resizing,
flips and the result are on the GPU. All this is read in DALI's and nvImageCodec's sources; it waits for a GPU to be
measured (`python -m benchmarks.gpu`) and tested (tests/gpu), above all what nvJPEG makes of damage. Whether its
slices are right is asked at every start (`pipeline.decode.check`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import UserError
from pipeline.spent import Spent

Encoded = bytes | memoryview
Size = tuple[int, int]  # pixels: height, width
DecoderName = Literal["auto", "cpu", "dali"]
CPU = torch.device("cpu")
log = logging.getLogger("maestream")


@dataclass(frozen=True)
class Decoded:
    # uint8[n, 3, h, w], RGB; zeros where an image is bad. On a CUDA device it is complete, and was taken from
    # the allocator on another stream than the caller's: tell it who else uses the memory (Tensor.record_stream).
    images: torch.Tensor
    bad: dict[int, str]  # position in the batch → why it does not decode
    spent: Spent  # on the others


class Decoder(Protocol):
    size: Size

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        """Images of a batch, bicubic with antialiasing; EXIF orientation is ignored. Safe to call from several
        threads at once.

        Args:
            encoded: n encoded images.
            boxes: int[n, 4], (y, x, height, width) of each crop in stored pixels.
            flips: bool[n], whether to mirror each crop.
        """
        ...

    def close(self) -> None: ...


def make_decoder(name: DecoderName, size: int | Size, threads: int, device: torch.device = CPU) -> Decoder:
    """An executor for crops of `size` pixels, (height, width) or both the same, with `threads` threads, for
    a trainer on `device`.

    `auto` is DALI on a CUDA device where it gives the CPU's slices, which takes some seconds to see; else cpu, and
    a warning if there is a CUDA device. On a CPU that is about three times as fast as DALI (224-pixel crops of
    ImageNet photographs). UserError where `dali` cannot be had.
    """
    size = (size, size) if isinstance(size, int) else size
    on_gpu = device.type == "cuda"
    if name == "dali" or (name == "auto" and on_gpu):
        try:
            from pipeline.decode.dali import DaliDecoder
        except ImportError as error:
            problem: str | None = f"DALI does not import ({error}): it exists for linux x86_64 alone"
        else:
            problem = _problem_of(device) if on_gpu else None
            if not problem:
                return DaliDecoder(size, threads, device if on_gpu else CPU)
        if name == "dali":
            raise UserError(f"data.decoder=dali cannot be used here: {problem}; data.decoder=cpu can")
        log.warning("images are decoded on the CPU: %s", problem)
    from pipeline.decode.cpu import CpuDecoder

    return CpuDecoder(size, threads, pinned=on_gpu)


def _problem_of(gpu: torch.device) -> str | None:
    """Why DALI is not to be trusted there, and what to do; None if it is."""
    from pipeline.decode.check import slices_differ_on

    problem = slices_differ_on(gpu)
    return problem and (
        f"DALI's slices on {gpu} are not right: {problem}. nvImageCodec 0.9.0 is known for that "
        "(NVIDIA/nvImageCodec#55): install nvidia-dali-cuda120==2.2.0, which has 0.8"
    )


def refused(encoded: Encoded) -> str | None:
    """Why no executor decodes an image whatever it could do, by its first bytes; None for JPEG and PNG."""
    head = bytes(encoded[:8])
    return None if head[:3] == b"\xff\xd8\xff" or head == b"\x89PNG\r\n\x1a\n" else "it is no JPEG or PNG"
