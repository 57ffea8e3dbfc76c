"""Memory for the images of batches, which is used again for later batches.

Without it, glibc keeps freed batches in the heaps of several threads, up to 150 MB more than is in use. New memory from the system
for each batch would cost a page fault for every 4 KiB of it.
"""

import math
import mmap
import weakref
from collections import deque

import numpy as np
import torch

SPARE = 4  # free buffers that are kept: as many as there are batches on the way to the trainer


class BatchMemory:
    """Allocates tensors on the CPU. Thread-safe."""

    def __init__(self) -> None:
        # Finalizers append to this. They may run in any thread at any time, so they must not take a lock.
        self.free: deque[mmap.mmap] = deque(maxlen=SPARE)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor whose values are not set, as `torch.empty` gives it. Its memory is free again when no tensor uses it any more."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        try:
            buffer = self.free.popleft()
        except IndexError:
            buffer = None
        if buffer is None or not size <= len(buffer) <= 2 * size:
            buffer = mmap.mmap(-1, size)
        array = np.frombuffer(buffer, np.uint8, size)
        weakref.finalize(array, self.free.append, buffer).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)
