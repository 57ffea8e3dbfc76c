"""Decode with NVIDIA DALI. Of a JPEG only the region of the crop is decoded. On a GPU all work happens there, and only
the encoded bytes are copied to it.

One image that DALI cannot decode breaks its whole pipeline for good (NVIDIA/DALI#3913). The pipeline is then rebuilt,
and the batch is decoded again without that image.

DALI gets the images that it decodes to the same pixels as the CPU decoder: 8-bit JPEG, PNG and WebP for batches of RGB or
grey. The CPU decoder makes the other crops of the batch.

There is one pipeline for each batch that is decoded at the same time: while the GPU works on one batch, the host
parses the next.
"""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray

from pipeline.decode.cpu import CpuDecoder, decodes_as_rgb
from pipeline.decode.decoder import Decoded, Encoded, Size
from pipeline.images.convert import LUMA
from pipeline.images.formats import image_format
from pipeline.images.pixels import RGB, Pixels
from pipeline.stage_times import StageTimes

# The share of a batch that a GPU's JPEG engines decode; host threads and its other cores decode the rest at the same
# time. The best value depends on the GPU and on the number of threads. This is DALI's default; `python -m
# benchmarks.gpu` measures others.
HW_DECODER_LOAD = 0.65
PNG_END = b"IEND\xaeB`\x82"


@pipeline_def
def _graph(size: Size, decoding: str) -> object:
    images = fn.decoders.image_slice(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        fn.external_source(name="anchor", dtype=types.INT32, ndim=1),
        fn.external_source(name="shape", dtype=types.INT32, ndim=1),
        axes=(0, 1),
        device=decoding,
        output_type=types.RGB,
        adjust_orientation=False,  # as in ImageFolder; boxes are in stored pixels
        jpeg_fancy_upsampling=True,  # as libjpeg does by default
        hw_decoder_load=HW_DECODER_LOAD,
        affine=False,  # otherwise the threads of all pipelines and workers are pinned to the same first cores
    )
    # These run on the device where the decoded images are.
    images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.flip(images, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))
    return fn.transpose(images, perm=[2, 0, 1])


class DaliDecoder:
    """A `Decoder` on the CPU or on a CUDA device, which then holds the decoded images.

    Args:
        size: (height, width) of the crops, pixels.
        threads: number of threads on the host for each pipeline.
        device: decodes, and holds the images.
        pixels: type of the batches.
    """

    def __init__(self, size: Size, threads: int, device: torch.device, pixels: Pixels = RGB) -> None:
        self.size = size
        self.pixels = pixels
        self.threads = threads
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.idle: list[Pipeline] = []
        self.cpu = CpuDecoder(size, threads, pinned=device.type == "cuda", pixels=pixels)
        self.capacity = 0  # images for which a new pipeline is built: the largest batch so far

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        good = np.flatnonzero([self._decodes(data) for data in encoded])
        # On a GPU, images are written to torch's memory on a stream of their own, because other work is queued on the
        # trainer's stream. They are complete when they are returned: this thread waits for that, not the trainer's
        # stream. (Without a GPU the stream is None, and this does nothing.)
        with torch.cuda.stream(self.stream):
            if not len(good):
                decoded = self.cpu(encoded, boxes, flips)
                on_device = decoded.images.to(self.device, non_blocking=True)
                self._wait()
                return Decoded(on_device, decoded.bad, decoded.stage_times)
            bad: dict[int, str] = {}
            others = np.setdiff1d(np.arange(len(encoded)), good)
            images, stage_times = self._run(encoded, boxes, flips, good)
            if isinstance(images, str):
                # Rare: find the bad images one by one, then decode the good ones.
                for i in good.tolist():
                    alone, _ = self._run(encoded, boxes, flips, np.array([i]))
                    if isinstance(alone, str):
                        bad[i] = alone
                good = np.setdiff1d(good, list(bad))
                images, stage_times = self._run(encoded, boxes, flips, good)
            if isinstance(images, str):
                raise RuntimeError(
                    f"DALI decodes each of these images by itself, but not as a batch: {images}"
                )
            if self.pixels.channels == 1:
                images = _to_grey(images)
            if len(good) < len(encoded):
                parts = torch.zeros((len(encoded), *images.shape[1:]), dtype=torch.uint8, device=self.device)
                parts[torch.from_numpy(good)] = images
                if len(others):
                    decoded = self.cpu([encoded[i] for i in others], boxes[others], flips[others])
                    parts[torch.from_numpy(others)] = decoded.images.to(self.device, non_blocking=True)
                    bad |= {int(others[i]): reason for i, reason in decoded.bad.items()}
                    stage_times += decoded.stage_times
                images = parts
            self._wait()
        return Decoded(images, bad, stage_times)

    def _decodes(self, data: Encoded) -> bool:
        """Whether DALI decodes this file, with the same pixels as the CPU decoder."""
        if self.pixels.dtype != "uint8" or self.pixels.channels not in (1, 3):
            return False
        if image_format(data) == "WebP":
            return not (data[12:16] == b"VP8X" and data[20] & 2)  # animated
        if image_format(data) == "PNG" and bytes(data[-8:]) != PNG_END:
            return False  # Pillow reads PNGs that lack their last bytes
        return decodes_as_rgb(data, self.pixels)

    def _run(
        self,
        encoded: Sequence[Encoded],
        boxes: npt.NDArray[np.int64],
        flips: npt.NDArray[np.bool_],
        chosen: npt.NDArray[np.int64],
    ) -> tuple[torch.Tensor | str, StageTimes]:
        """Decode the images at the positions `chosen` (int64[n]).

        Returns uint8[n, 3, h, w], or DALI's error message if one of them is bad; and the time spent.
        """
        images = torch.empty((len(chosen), 3, *self.size), dtype=torch.uint8, device=self.device)
        if not len(chosen):
            return images, StageTimes()
        graph = self._idle_pipeline(len(chosen))
        try:
            begin = time.perf_counter()
            graph.feed_input("encoded", [np.frombuffer(encoded[i], np.uint8) for i in chosen])
            graph.feed_input("anchor", boxes[chosen, :2].astype(np.int32))
            graph.feed_input("shape", boxes[chosen, 2:].astype(np.int32))
            graph.feed_input("flip", flips[chosen].astype(np.int32))
            fed = time.perf_counter()
            (made,) = graph.run()  # waits for the GPU, without the GIL
        except RuntimeError as error:
            return "DALI: " + str(error).rpartition("encountered:")[2].strip().partition("\n")[
                0
            ], StageTimes()
        ran = time.perf_counter()
        # Copy: DALI reuses its memory as soon as `made` is freed, even if a GPU stream has not read it yet.
        feed_ndarray(made.as_tensor(), images, self.stream)
        self._wait()
        self.idle.append(graph)
        # One thread feeds and copies; all of them are busy while the graph runs.
        decode_s = fed - begin + self.threads * (ran - fed)
        return images, StageTimes(decode=decode_s, copy=time.perf_counter() - ran)

    def _wait(self) -> None:
        if self.stream:
            self.stream.synchronize()

    def _idle_pipeline(self, batch: int) -> Pipeline:
        """A pipeline that no thread uses, for at least `batch` images."""
        self.capacity = max(self.capacity, batch)
        try:
            graph = self.idle.pop()
        except IndexError:
            graph = None
        if graph is None or graph.max_batch_size < batch:
            graph = _graph(
                self.size,
                "mixed" if self.stream else "cpu",
                batch_size=self.capacity,
                num_threads=self.threads,
                device_id=self.device.index,
                prefetch_queue_depth=1,
            )
            graph.build()
        return graph

    def close(self) -> None:
        """Free pipelines and threads. No call may be in progress."""
        self.idle.clear()
        self.cpu.close()


def _to_grey(images: torch.Tensor) -> torch.Tensor:
    """The luma uint8[n, 1, h, w] of uint8[n, 3, h, w]."""
    weights = torch.tensor(LUMA, dtype=torch.int32, device=images.device)[:, None, None]
    return ((images.int() * weights).sum(dim=1, keepdim=True) + (1 << 15) >> 16).to(torch.uint8)
