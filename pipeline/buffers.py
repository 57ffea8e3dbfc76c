"""Memory that a fetcher fills and its worker reads, again and again.

A page of memory costs more to be had from the system than to be filled (0.5 s of a core for each GB here, counted in
both processes), so what the worker has done with is filled again with the next block of about that size.
"""

import itertools
import mmap
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(eq=False)
class Buffer:
    """Memory that both processes map."""

    number: int
    capacity: int  # bytes
    mapping: mmap.mmap | None = None  # once the fetcher has made it


class Buffers:
    """The worker's buffers: which are free, and which of them to give up.

    What is taken has at most a quarter more than the bytes that were asked for; beside that, free buffers are kept
    up to `spare_bytes`.
    """

    def __init__(self, spare_bytes: int) -> None:
        self.spare_bytes = spare_bytes
        self.numbers = itertools.count()
        self.free: list[Buffer] = []  # the one that has been so for the longest first
        # Filled by finalizers, which may run in any thread at any place: they may not take a lock.
        self.returned: deque[Buffer] = deque()

    def take(self, size: int) -> tuple[Buffer, list[int]]:
        """A buffer for `size` bytes, and the numbers of those that are given up for it. Not thread-safe."""
        while self.returned:
            self.free.append(self.returned.popleft())
        fitting = [b for b in self.free if size <= b.capacity <= size + size // 4]
        if fitting:
            best = min(fitting, key=lambda b: b.capacity)
            self.free.remove(best)
            return best, []
        given_up = []
        while sum(b.capacity for b in self.free) > self.spare_bytes:
            given_up.append(self.free.pop(0).number)
        return Buffer(next(self.numbers), size + size // 8), given_up

    def lend(self, buffer: Buffer, size: int) -> memoryview:
        """Its first `size` bytes. It is free again when nobody holds a view of them any more."""
        assert buffer.mapping is not None
        lent = np.frombuffer(buffer.mapping, np.uint8, size)
        weakref.finalize(lent, self.returned.append, buffer).atexit = False
        return memoryview(lent)  # type: ignore[arg-type]  # numpy's annotations lack the buffer protocol before 3.12

    def give_back(self, buffer: Buffer) -> None:
        """It was taken, and not lent."""
        self.returned.append(buffer)
