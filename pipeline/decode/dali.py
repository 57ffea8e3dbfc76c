"""Decode with NVIDIA DALI. Of a JPEG only the region of the crop is decoded. On a GPU all work happens there, and only
the encoded bytes are copied to it.

One image that DALI cannot decode breaks its whole pipeline for good (NVIDIA/DALI#3913). The pipeline is then rebuilt,
and the batch is decoded again without that image.

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

from pipeline.decode.decoder import Decoded, Encoded, Size, unsupported_format
from pipeline.stage_times import StageTimes

# The share of a batch that a GPU's JPEG engines decode; host threads and its other cores decode the rest at the same
# time. The best value depends on the GPU and on the number of threads. This is DALI's default; `python -m
# benchmarks.gpu` measures others.
HW_DECODER_LOAD = 0.65


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
    """

    def __init__(self, size: Size, threads: int, device: torch.device) -> None:
        self.size = size
        self.threads = threads
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.idle: list[Pipeline] = []
        self.capacity = 0  # images for which a new pipeline is built: the largest batch so far

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        bad = {i: reason for i, data in enumerate(encoded) if (reason := unsupported_format(data))}
        good = np.setdiff1d(np.arange(len(encoded)), list(bad))
        # On a GPU, images are written to torch's memory on a stream of their own, because other work is queued on the
        # trainer's stream. They are complete when they are returned: this thread waits for that, not the trainer's
        # stream. (Without a GPU the stream is None, and this does nothing.)
        with torch.cuda.stream(self.stream):
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
            if bad:
                with_bad = torch.zeros(
                    (len(encoded), *images.shape[1:]), dtype=torch.uint8, device=self.device
                )
                with_bad[torch.from_numpy(good)] = images
                images = with_bad
                self._wait()
        return Decoded(images, bad, stage_times)

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
        """Free the pipelines. No call may be in progress."""
        self.idle.clear()
