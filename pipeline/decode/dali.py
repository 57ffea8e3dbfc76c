"""Decode with NVIDIA DALI on the CPU: only the crop's region of a JPEG is decoded.

One image that DALI cannot decode makes it give up its whole pipeline for good (NVIDIA/DALI#3913), so the
pipeline is rebuilt then, and the batch is done again without the image that was to blame.
"""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipeline.decode import Decoded, Encoded, refused
from pipeline.spent import Spent


@pipeline_def
def _graph(size: int) -> object:
    jpegs = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    images = fn.decoders.image_slice(
        jpegs,
        fn.external_source(name="anchor", dtype=types.INT32, ndim=1),
        fn.external_source(name="shape", dtype=types.INT32, ndim=1),
        axes=(0, 1),
        device="cpu",
        output_type=types.RGB,
        adjust_orientation=False,  # as ImageFolder does; a box belongs to the stored pixels
        jpeg_fancy_upsampling=True,  # as libjpeg does by default
    )
    images = fn.resize(images, size=(size, size), interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.flip(images, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))
    return fn.transpose(images, perm=[2, 0, 1])


class DaliDecoder:
    """See `pipeline.decode.Decoder`."""

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self.threads = threads
        self.graph: Pipeline | None = None
        self.capacity = 0

    def __call__(
        self, encoded: Sequence[Encoded], boxes: npt.NDArray[np.int64], flips: npt.NDArray[np.bool_]
    ) -> Decoded:
        bad = {i: reason for i, data in enumerate(encoded) if (reason := refused(data))}
        good = np.setdiff1d(np.arange(len(encoded)), list(bad))
        try:
            done, spent = self._run(encoded, boxes, flips, good)
        except RuntimeError:
            # Seldom: find the bad ones one by one, then do the good ones.
            for i in good:
                try:
                    self._run(encoded, boxes, flips, np.array([i]))
                except RuntimeError as error:
                    bad[int(i)] = (
                        "DALI: " + str(error).partition("encountered:")[2].strip().partition("\n")[0]
                    )
            good = np.setdiff1d(good, list(bad))
            done, spent = self._run(encoded, boxes, flips, good)
        if not bad:
            return Decoded(done, bad, spent)
        images = torch.zeros((len(encoded), 3, self.size, self.size), dtype=torch.uint8)
        images[torch.from_numpy(good)] = done
        return Decoded(images, bad, spent)

    def _run(
        self,
        encoded: Sequence[Encoded],
        boxes: npt.NDArray[np.int64],
        flips: npt.NDArray[np.bool_],
        chosen: npt.NDArray[np.int64],
    ) -> tuple[torch.Tensor, Spent]:
        """uint8[len(chosen), 3, size, size], and what it took. RuntimeError, and no pipeline any more, if one is bad."""
        if not len(chosen):
            return torch.zeros((0, 3, self.size, self.size), dtype=torch.uint8), Spent()
        graph = self._ready(len(chosen))
        try:
            begin = time.perf_counter()
            graph.feed_input("encoded", [np.frombuffer(encoded[i], np.uint8) for i in chosen])
            graph.feed_input("anchor", boxes[chosen, :2].astype(np.int32))
            graph.feed_input("shape", boxes[chosen, 2:].astype(np.int32))
            graph.feed_input("flip", flips[chosen].astype(np.int32))
            fed = time.perf_counter()
            (images,) = graph.run()
            ran = time.perf_counter()
            done = torch.from_numpy(np.array(images.as_array()))
            # One thread feeds and copies; all of them are held as long as the graph runs.
            decode_s = fed - begin + self.threads * (ran - fed)
            return done, Spent(decode=decode_s, copy=time.perf_counter() - ran)
        except RuntimeError:
            self.close()
            raise

    def _ready(self, batch: int) -> Pipeline:
        if self.graph is None or batch > self.capacity:
            self.capacity = max(batch, self.capacity)
            self.graph = _graph(
                self.size,
                batch_size=self.capacity,
                num_threads=self.threads,
                device_id=None,
                prefetch_queue_depth=1,
            )
            self.graph.build()
        return self.graph

    def close(self) -> None:
        self.graph = None
