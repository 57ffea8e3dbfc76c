"""Shards are read in aligned chunks: the ranges of a lane's block share them, and each is fetched once.

The newest chunks are kept in memory up to a bound. Reads ahead go through a thread pool.
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipeline.decode import Encoded
from pipeline.errors import UserError
from pipeline.manifest import Dataset, Located

CHUNK_BYTES = 1 << 20
FETCH_THREADS = 16  # requests under way at once; they wait, they do not compute

Chunk = tuple[int, int]  # shard, number of the chunk in it


class ChunkCache:
    """Reads of one dataset. Keeps at most `capacity_bytes` of chunks, those used last.

    It must hold what is read ahead, or chunks go before they are used and are fetched again.
    """

    def __init__(self, dataset: Dataset, capacity_bytes: int) -> None:
        self.dataset = dataset
        self.capacity = max(capacity_bytes // CHUNK_BYTES, 2)  # in chunks
        self.chunks: OrderedDict[Chunk, Future[bytes]] = OrderedDict()
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")
        self.fetched_bytes = 0

    def prefetch(self, located: Located) -> None:
        """Begin to fetch what these samples lie in."""
        for chunk in self._chunks_of(located):
            self._want(chunk)

    def read(self, located: Located) -> list[Encoded]:
        """The bytes of each sample: n buffers. UserError where a shard is missing or too short."""
        futures = {chunk: self._want(chunk) for chunk in self._chunks_of(located)}
        chunks = {chunk: memoryview(future.result()) for chunk, future in futures.items()}
        encoded: list[Encoded] = []
        for shard, offset, size in zip(
            located.shard.tolist(), located.offset.tolist(), located.size.tolist(), strict=True
        ):
            first, last = offset // CHUNK_BYTES, (offset + size - 1) // CHUNK_BYTES
            begin = offset - first * CHUNK_BYTES
            if first == last:
                encoded.append(chunks[shard, first][begin : begin + size])
            else:
                joined = b"".join(chunks[shard, n] for n in range(first, last + 1))
                encoded.append(joined[begin : begin + size])
        return encoded

    def _chunks_of(self, located: Located) -> list[Chunk]:
        first = located.offset // CHUNK_BYTES
        last = (located.offset + located.size - 1) // CHUNK_BYTES
        spread = np.arange(int((last - first).max(initial=0)) + 1)
        shard, number = np.broadcast_arrays(located.shard[:, None], first[:, None] + spread)
        pairs = np.stack([shard, number], -1)[number <= last[:, None]]
        return [(int(s), int(n)) for s, n in np.unique(pairs, axis=0)]

    def _want(self, chunk: Chunk) -> "Future[bytes]":
        with self.lock:
            if chunk not in self.chunks or _failed(self.chunks[chunk]):
                self.chunks[chunk] = self.pool.submit(self._fetch, chunk)
            self.chunks.move_to_end(chunk)
            while len(self.chunks) > self.capacity:
                self.chunks.popitem(last=False)
            return self.chunks[chunk]

    def _fetch(self, chunk: Chunk) -> bytes:
        shard, number = chunk
        name = self.dataset.shard_name(shard)
        start = number * CHUNK_BYTES
        size = min(CHUNK_BYTES, int(self.dataset.shard_bytes[shard]) - start)
        try:
            data = self.dataset.shard_store.read_range(name, start, size)
        except FileNotFoundError:
            raise UserError(
                f"{self.dataset.store.describe(name)} is missing: copy or build the dataset again "
                f"(`maestream shards verify {self.dataset.store.url}` names all that is wrong)"
            ) from None
        with self.lock:
            self.fetched_bytes += size
        return data

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def _failed(future: "Future[bytes]") -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
