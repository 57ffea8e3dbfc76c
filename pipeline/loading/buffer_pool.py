"""A pool of shared buffers, which the fetch process fills and its worker reads.

Getting new memory from the system costs more than filling it (0.5 s of a core per GB on our 2-core test machine, in
both processes together). So a buffer that the worker no longer uses is filled again with the next block of about
the same size.
"""

import itertools
import mmap
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(eq=False)
class Buffer:
    """Memory that is mapped by both processes."""

    number: int  # names the buffer in requests
    capacity: int  # bytes
    mapping: mmap.mmap | None = None  # set when the fetch process has created it


class BufferPool:
    """The worker's free buffers.

    A buffer that is taken has at most a quarter more bytes than were asked for. Free buffers are kept up to
    `spare_bytes` in all; the oldest are freed when a new one is made.
    """

    def __init__(self, spare_bytes: int) -> None:
        self.spare_bytes = spare_bytes
        self.numbers = itertools.count()
        self.free: list[Buffer] = []  # oldest first
        # Finalizers append to this. They may run in any thread at any time, so they must not take a lock.
        self.returned: deque[Buffer] = deque()

    def take(self, size: int) -> tuple[Buffer, list[int]]:
        """A buffer for `size` bytes, and the numbers of the buffers to free. Not thread-safe."""
        while self.returned:
            self.free.append(self.returned.popleft())
        fitting = [b for b in self.free if size <= b.capacity <= size + size // 4]
        if fitting:
            best = min(fitting, key=lambda b: b.capacity)
            self.free.remove(best)
            return best, []
        to_free = []
        while sum(b.capacity for b in self.free) > self.spare_bytes:
            to_free.append(self.free.pop(0).number)
        return Buffer(next(self.numbers), size + size // 8), to_free

    def lend(self, buffer: Buffer, size: int) -> memoryview:
        """A view of the buffer's first `size` bytes. The buffer is free again when no view of it exists any more."""
        assert buffer.mapping is not None
        lent = np.frombuffer(buffer.mapping, np.uint8, size)
        weakref.finalize(lent, self.returned.append, buffer).atexit = False
        return memoryview(lent)  # type: ignore[arg-type]  # numpy's annotations lack the buffer protocol before 3.12

    def give_back(self, buffer: Buffer) -> None:
        """Return a buffer that was taken but not lent."""
        self.returned.append(buffer)
