"""Decode with NVIDIA DALI: of a JPEG the crop's region alone. On a GPU all is done there, and only the encoded
bytes are copied to it.

One image that DALI cannot decode makes it give up its whole pipeline for good (NVIDIA/DALI#3913), so the
pipeline is rebuilt then, and the batch is done again without the image that was to blame.

As many pipelines are kept as batches decode at once: while the GPU works on one, the host parses the next.
"""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray

from pipeline.decode import Decoded, Encoded, Size, refused
from pipeline.spent import Spent

# The share of a batch that a GPU's JPEG engines decode; host threads and its other cores do the rest meanwhile. What
# is best depends on the GPU and on how many threads there are. This is DALI's default; `python -m benchmarks.gpu`
# measures others.
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
        adjust_orientation=False,  # as ImageFolder does; a box belongs to the stored pixels
        jpeg_fancy_upsampling=True,  # as libjpeg does by default
        hw_decoder_load=HW_DECODER_LOAD,
        affine=False,  # else the threads of all pipelines and workers would be tied to the same first cores
    )
    # These run where the images are.
    images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.flip(images, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))
    return fn.transpose(images, perm=[2, 0, 1])


class DaliDecoder:
    """See `pipeline.decode.Decoder`. On the CPU, or on a CUDA device, where its images then are."""

    def __init__(self, size: Size, threads: int, device: torch.device) -> None:
        self.size = size
        self.threads = threads
        self.device = torch.empty(0, device=device).device  # a CUDA device with its number
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.idle: list[Pipeline] = []
        self.capacity = 0  # of a new pipeline: the largest batch so far

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        bad = {i: reason for i, data in enumerate(encoded) if (reason := refused(data))}
        good = np.setdiff1d(np.arange(len(encoded)), list(bad))
        # On a GPU images are handed over in memory of torch's, which is written on a stream of our own, because the
        # trainer's has other work before it. They are complete then: it is this thread that waits for that, not the
        # trainer's stream. (Without a GPU the stream is None, and this does nothing.)
        with torch.cuda.stream(self.stream):
            images, spent = self._run(encoded, boxes, flips, good)
            if isinstance(images, str):
                # Seldom: find the bad ones one by one, then do the good ones.
                for i in good.tolist():
                    alone, _ = self._run(encoded, boxes, flips, np.array([i]))
                    if isinstance(alone, str):
                        bad[i] = alone
                good = np.setdiff1d(good, list(bad))
                images, spent = self._run(encoded, boxes, flips, good)
            if isinstance(images, str):
                raise RuntimeError(f"each of these images decodes by itself, but not together: {images}")
            if bad:
                whole = torch.zeros((len(encoded), *images.shape[1:]), dtype=torch.uint8, device=self.device)
                whole[torch.from_numpy(good)] = images
                images = whole
                self._wait()
        return Decoded(images, bad, spent)

    def _run(
        self,
        encoded: Sequence[Encoded],
        boxes: npt.NDArray[np.int64],
        flips: npt.NDArray[np.bool_],
        chosen: npt.NDArray[np.int64],
    ) -> tuple[torch.Tensor | str, Spent]:
        """uint8[len(chosen), 3, h, w]; or, if one of them is bad, what DALI says about it. And what it took."""
        images = torch.empty((len(chosen), 3, *self.size), dtype=torch.uint8, device=self.device)
        if not len(chosen):
            return images, Spent()
        graph = self._take(len(chosen))
        try:
            begin = time.perf_counter()
            graph.feed_input("encoded", [np.frombuffer(encoded[i], np.uint8) for i in chosen])
            graph.feed_input("anchor", boxes[chosen, :2].astype(np.int32))
            graph.feed_input("shape", boxes[chosen, 2:].astype(np.int32))
            graph.feed_input("flip", flips[chosen].astype(np.int32))
            fed = time.perf_counter()
            (made,) = graph.run()  # waits for the GPU, without Python's lock
        except RuntimeError as error:
            return "DALI: " + str(error).rpartition("encountered:")[2].strip().partition("\n")[0], Spent()
        ran = time.perf_counter()
        # A copy: DALI writes its memory anew as soon as `made` is gone, whoever may still have to read it on a GPU.
        feed_ndarray(made.as_tensor(), images, self.stream)
        self._wait()
        self.idle.append(graph)
        # One thread feeds and copies; all of them are held as long as the graph runs.
        decode_s = fed - begin + self.threads * (ran - fed)
        return images, Spent(decode=decode_s, copy=time.perf_counter() - ran)

    def _wait(self) -> None:
        if self.stream:
            self.stream.synchronize()

    def _take(self, batch: int) -> Pipeline:
        """A pipeline that nobody uses, for up to so many images."""
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
        """End the pipelines. Nothing may be decoding."""
        self.idle.clear()
