"""The fetch process, which reads storage for one worker (see `pipeline.loading.fetch_client` for the protocol):

    python -m pipeline.loading.fetch_process SOCKET JOB

SOCKET is the descriptor of the socket for answers; JOB is a JSON object with the URLs, the disk cache and the timeouts.

A request's ranges are cut into pieces, and threads read the pieces at the same time: chunks that are in the disk cache
one by one, and what lies between them from storage. The thread that finishes the last piece sends the answer.

Storage errors are retried in `pipeline.storage.store`; an error that remains is sent to the worker as text.
"""

import itertools
import json
import mmap
import os
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import UserError
from pipeline.loading.disk_cache import DiskCache
from pipeline.loading.fetch_client import MISSING, WARNING, Range, send_answer
from pipeline.storage import store as storage
from pipeline.storage.mounts import open_tars
from pipeline.storage.store import open_store

# Number of reads at the same time; they mostly wait. Large reads from an object store are held in this process's memory
# until they are complete, LARGE_READS · GET_BYTES and up to twice that while a response body is joined, so they are few.
SMALL_READS, LARGE_READS = 32, 10
SMALL_BYTES = 1 << 20  # largest small read
# Largest read from an object store and from a local file. S3 recommends 8 to 16 MB per request ("Performance guidelines
# for Amazon S3").
GET_BYTES, FILE_BYTES = 16 << 20, 4 << 20


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a shard."""

    range: Range
    start: int
    stop: int
    cached: bool  # in the disk cache


@dataclass
class Reply:
    """An answer that is not complete yet."""

    request: int
    memory: memoryview
    file: int | None  # descriptor of the memory, if the worker does not have it yet
    remaining: int  # pieces that are not read yet
    lock: threading.Lock = field(default_factory=threading.Lock)
    error: str | None = None
    storage_bytes: int = 0
    cached_bytes: int = 0


class FetchServer:
    """Does what the worker requests and sends the answers."""

    def __init__(
        self, answers: socket.socket, shards_url: str, indexes_url: str, disk_cache: dict[str, Any] | None
    ) -> None:
        self.answers = answers
        self.store = open_tars(shards_url, already_reached=True)
        self.index_store = open_store(indexes_url, already_reached=True)
        self.cache = DiskCache(**disk_cache) if disk_cache else None
        self.buffers: dict[int, mmap.mmap] = {}
        self.cache_full = False  # a write failed: do not cache more
        self.sending = threading.Lock()
        self.caching = threading.Lock()
        self.small = ThreadPoolExecutor(SMALL_READS)
        self.large = ThreadPoolExecutor(LARGE_READS)

    def read_ranges(
        self,
        request: int,
        ranges: list[Range],
        fill_cache: bool,
        buffer: int,
        capacity: int,
        to_free: list[int],
    ) -> None:
        """Start to read ranges into the buffer with this number, see `Fetcher.read_ranges`."""
        for number in to_free:
            self.buffers.pop(number, None)
        file = None
        if buffer not in self.buffers:
            file, self.buffers[buffer] = _anonymous_memory(capacity)
        max_bytes = FILE_BYTES if self.store.is_local else GET_BYTES
        pieces = [piece for r in ranges for piece in cut_to_pieces(r, max_bytes, self.cache)]
        reply = Reply(request, memoryview(self.buffers[buffer]), file, len(pieces))
        position = 0
        for piece in pieces:
            size = piece.stop - piece.start
            small = size <= SMALL_BYTES and not self.store.is_local
            (self.small if small else self.large).submit(
                self._read_piece, piece, reply.memory[position : position + size], fill_cache, reply
            )
            position += size

    def read_file(self, request: int, name: str) -> None:
        """Start to read a whole file from the folder of the indexes."""
        self.small.submit(self._read_file, request, name)

    def _read_piece(self, piece: Piece, memory: memoryview, fill_cache: bool, reply: Reply) -> None:
        """Read one piece, and send the answer if it was the last one."""
        error, storage_bytes, cached_bytes = None, 0, 0
        try:
            if reply.error is None:
                if piece.cached and self._read_cached(piece, memory):
                    cached_bytes = len(memory)
                else:
                    storage_bytes = self._read_storage(piece, memory, fill_cache)
        except Exception as problem:
            error = _explain(problem, self.store.describe(piece.range.name))
        with reply.lock:
            reply.error = reply.error or error
            reply.storage_bytes += storage_bytes
            reply.cached_bytes += cached_bytes
            reply.remaining -= 1
            last = reply.remaining == 0
        if last:
            self._answer(reply)

    def _read_cached(self, piece: Piece, memory: memoryview) -> bool:
        assert self.cache is not None
        chunk, start = divmod(piece.start, self.cache.chunk_bytes)
        return self.cache.read(piece.range.shard, chunk, start, memory)

    def _read_storage(self, piece: Piece, memory: memoryview, fill_cache: bool) -> int:
        """Read a piece from storage. Returns the number of bytes read: more than the piece if its first or last chunk
        goes to the disk cache, because chunks are cached as a whole."""
        r, start, stop = piece.range, piece.start, piece.stop
        to_cache: list[int] = []
        if self.cache is not None and not self.cache_full and fill_cache:
            size = self.cache.chunk_bytes
            chunks = range(start // size, (stop - 1) // size + 1)
            to_cache = [chunk for chunk in chunks if self.cache.holds(r.first_chunk + chunk)]
        if not to_cache:
            self.store.read_into(r.name, start, memory)
            return stop - start
        start = min(start, to_cache[0] * size)
        stop = max(stop, min((to_cache[-1] + 1) * size, r.shard_bytes))
        data = memoryview(self.store.read_range(r.name, start, stop - start))
        memory[:] = data[piece.start - start : piece.stop - start]
        for chunk in to_cache:
            self._cache(r.shard, chunk, data[chunk * size - start : (chunk + 1) * size - start])
        return stop - start

    def _cache(self, shard: int, chunk: int, data: memoryview) -> None:
        """Write a chunk to the disk cache. If that fails, warn once and cache nothing more."""
        assert self.cache is not None
        try:
            with self.caching:
                if not self.cache_full:
                    self.cache.write(shard, chunk, data)
        except OSError as problem:
            self.cache_full = True
            text = f"cannot write to the disk cache {self.cache.folder} ({problem.strerror}): continuing without caching more"
            with self.sending:
                send_answer(self.answers, WARNING, text)

    def _read_file(self, request: int, name: str) -> None:
        reply = Reply(request, memoryview(b""), None, remaining=0)
        try:
            if data := self.index_store.read(name):
                reply.file, memory = _anonymous_memory(len(data))
                memory[:] = data
                reply.storage_bytes = len(data)
        except Exception as problem:
            reply.error = _explain(problem, self.index_store.describe(name))
        self._answer(reply)

    def _answer(self, reply: Reply) -> None:
        with self.sending:
            send_answer(
                self.answers, reply.request, reply.error, reply.file, reply.storage_bytes, reply.cached_bytes
            )
        if reply.file is not None:
            os.close(reply.file)


def cut_to_pieces(r: Range, max_bytes: int, cache: DiskCache | None) -> list[Piece]:
    """The range as consecutive pieces: each chunk that is in the disk cache, and what lies between them in pieces of at
    most `max_bytes`."""
    pieces: list[Piece] = []
    begin, stop = r.start, r.start + r.size
    if cache:
        size = cache.chunk_bytes
        for chunk in range(begin // size, (stop - 1) // size + 1):
            if cache.holds(r.first_chunk + chunk) and cache.path(r.shard, chunk).exists():
                first, last = max(r.start, chunk * size), min((chunk + 1) * size, stop)
                pieces += [*_cut_evenly(r, begin, first, max_bytes, size), Piece(r, first, last, True)]
                begin = last
    pieces += _cut_evenly(r, begin, stop, max_bytes, cache.chunk_bytes if cache else 1)
    return pieces


def _cut_evenly(r: Range, begin: int, stop: int, max_bytes: int, align: int) -> Iterator[Piece]:
    """Bytes [begin, stop) of a shard in pieces of about the same size, cut at multiples of `align` (the chunk size),
    so that no chunk is read twice to be cached."""
    count = -(-(stop - begin) // max_bytes)
    inner = ((begin + (stop - begin) * i // count) // align * align for i in range(1, count))
    borders = [begin, *(border for border in inner if border > begin), stop]
    for a, b in itertools.pairwise(borders):
        if a < b:
            yield Piece(r, a, b, False)


def _anonymous_memory(size: int) -> tuple[int, mmap.mmap]:
    """A file without a name, in memory if the system supports that. Returns its descriptor and its mapping."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("maestream")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file, mmap.mmap(file, size)


def _explain(problem: Exception, where: str) -> str:
    """The text of an error for the worker. Prints the traceback of an unexpected one."""
    if isinstance(problem, UserError):
        return str(problem)
    if isinstance(problem, FileNotFoundError):
        return f"{where} {MISSING}"
    traceback.print_exception(problem)
    return f"{where}: {type(problem).__name__}: {problem}"


def main() -> None:
    answers = socket.socket(fileno=int(sys.argv[1]))
    job = json.loads(sys.argv[2])
    storage.DEADLINE_S, storage.STALL_S = (
        job.pop("deadline_s"),
        job.pop("stall_s"),
    )  # the same as in the worker
    server = FetchServer(answers, **job)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        number = request.pop("number")
        if "file" in request:
            server.read_file(number, request["file"])
        else:
            ranges = [Range(*r) for r in request.pop("ranges")]
            server.read_ranges(number, ranges, **request)
    # The worker has closed the pipe, or has died. Finish writing a chunk to the disk cache; nothing else matters.
    with server.caching:
        os._exit(0)


if __name__ == "__main__":
    main()
