"""The process that reads storage for one worker: `python -m pipeline.fetching SOCKET JOB`, see `pipeline.fetcher`."""

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

from pipeline import storage
from pipeline.cache import KeptPart
from pipeline.errors import UserError
from pipeline.fetcher import MISSING, NOTICE, Range, send_answer
from pipeline.storage import open_store

# Reads under way at once: they wait, they do not compute. Large ones are few, because of an object store this
# process holds their bytes: LARGE_READS · GET_BYTES, at most twice while a body is put together.
SMALL_READS, LARGE_READS = 32, 10
SMALL_BYTES = 1 << 20
# The most that a large one reads: S3's advice is 8 to 16 MB a request ("Performance guidelines for Amazon S3").
GET_BYTES, FILE_BYTES = 16 << 20, 4 << 20


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a shard."""

    range: Range
    start: int
    stop: int
    here: bool  # in the kept part


@dataclass
class Reply:
    """An answer that is being put together."""

    request: int
    memory: memoryview
    file: int | None  # descriptor of the memory, where it is new to the worker
    left: int  # pieces
    lock: threading.Lock = field(default_factory=threading.Lock)
    error: str | None = None
    storage_bytes: int = 0
    kept_bytes: int = 0


class Fetching:
    def __init__(
        self, answers: socket.socket, shards_url: str, indexes_url: str, kept: dict[str, Any] | None
    ) -> None:
        self.answers = answers
        self.store = open_store(shards_url, known=True)
        self.index_store = open_store(indexes_url, known=True)
        self.kept = KeptPart(**kept) if kept else None
        self.buffers: dict[int, mmap.mmap] = {}
        self.full = False  # the kept part takes no more
        self.sending = threading.Lock()
        self.keeping = threading.Lock()
        self.small = ThreadPoolExecutor(SMALL_READS)
        self.large = ThreadPoolExecutor(LARGE_READS)

    def begin_ranges(
        self, request: int, ranges: list[Range], keep: bool, buffer: int, capacity: int, given_up: list[int]
    ) -> None:
        for number in given_up:
            self.buffers.pop(number, None)
        file = None
        if buffer not in self.buffers:
            file, self.buffers[buffer] = _anonymous_memory(capacity)
        most = FILE_BYTES if self.store.is_local else GET_BYTES
        cut = [cut_to_pieces(r, most, self.kept) for r in ranges]
        reply = Reply(request, memoryview(self.buffers[buffer]), file, sum(map(len, cut)))
        place = 0
        for piece in itertools.chain(*cut):
            size = piece.stop - piece.start
            small = size <= SMALL_BYTES and not self.store.is_local
            (self.small if small else self.large).submit(
                self._do_piece, piece, reply.memory[place : place + size], keep, reply
            )
            place += size

    def begin_whole(self, request: int, name: str) -> None:
        self.small.submit(self._do_whole, request, name)

    def _do_piece(self, piece: Piece, memory: memoryview, keep: bool, reply: Reply) -> None:
        """Read one piece; whoever does the last one answers."""
        error, storage_bytes, kept_bytes = None, 0, 0
        try:
            if reply.error is None:
                if piece.here and self._from_kept(piece, memory):
                    kept_bytes = len(memory)
                else:
                    storage_bytes = self._from_storage(piece, memory, keep)
        except Exception as problem:
            error = _explain(problem, self.store.describe(piece.range.name))
        with reply.lock:
            reply.error = reply.error or error
            reply.storage_bytes += storage_bytes
            reply.kept_bytes += kept_bytes
            reply.left -= 1
            last = reply.left == 0
        if last:
            self._answer(reply)

    def _from_kept(self, piece: Piece, memory: memoryview) -> bool:
        assert self.kept is not None
        chunk, start = divmod(piece.start, self.kept.chunk_bytes)
        return self.kept.read(piece.range.shard, chunk, start, memory)

    def _from_storage(self, piece: Piece, memory: memoryview, keep: bool) -> int:
        """Read a piece. Returns how many bytes were read: more if its first or last chunk is to be kept."""
        r, start, stop = piece.range, piece.start, piece.stop
        wanted: list[int] = []
        if self.kept is not None and not self.full and keep:
            size = self.kept.chunk_bytes
            chunks = range(start // size, (stop - 1) // size + 1)
            wanted = [chunk for chunk in chunks if self.kept.keeps(r.first_chunk + chunk)]
        if not wanted:
            self.store.read_into(r.name, start, memory)
            return stop - start
        start = min(start, wanted[0] * size)
        stop = max(stop, min((wanted[-1] + 1) * size, r.shard_bytes))
        data = memoryview(self.store.read_range(r.name, start, stop - start))
        memory[:] = data[piece.start - start : piece.stop - start]
        for chunk in wanted:
            self._keep(r.shard, chunk, data[chunk * size - start : (chunk + 1) * size - start])
        return stop - start

    def _keep(self, shard: int, chunk: int, data: memoryview) -> None:
        assert self.kept is not None
        try:
            with self.keeping:
                if not self.full:
                    self.kept.write(shard, chunk, data)
        except OSError as problem:
            self.full = True
            text = f"{self.kept.folder} takes no more ({problem.strerror}): going on without keeping more"
            with self.sending:
                send_answer(self.answers, NOTICE, text, None, 0, 0)

    def _do_whole(self, request: int, name: str) -> None:
        reply = Reply(request, memoryview(b""), None, 0)
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
                self.answers, reply.request, reply.error, reply.file, reply.storage_bytes, reply.kept_bytes
            )
        if reply.file is not None:
            os.close(reply.file)


def cut_to_pieces(r: Range, most: int, kept: KeptPart | None) -> list[Piece]:
    """Kept chunks that are here one by one, and what lies between them in pieces of at most `most` bytes."""
    pieces: list[Piece] = []
    begin, stop = r.start, r.start + r.size
    if kept:
        size = kept.chunk_bytes
        for chunk in range(begin // size, (stop - 1) // size + 1):
            if kept.keeps(r.first_chunk + chunk) and kept.path(r.shard, chunk).exists():
                first, last = max(r.start, chunk * size), min((chunk + 1) * size, stop)
                pieces += [*_even(r, begin, first, most, size), Piece(r, first, last, True)]
                begin = last
    pieces += _even(r, begin, stop, most, kept.chunk_bytes if kept else 1)
    return pieces


def _even(r: Range, begin: int, stop: int, most: int, grain: int) -> Iterator[Piece]:
    """Bytes [begin, stop) of a shard in pieces of about the same size, cut at multiples of `grain`: a chunk that
    is to be kept is then read once."""
    count = -(-(stop - begin) // most)
    inner = ((begin + (stop - begin) * i // count) // grain * grain for i in range(1, count))
    borders = [begin, *(border for border in inner if border > begin), stop]
    for a, b in itertools.pairwise(borders):
        if a < b:
            yield Piece(r, a, b, False)


def _anonymous_memory(size: int) -> tuple[int, mmap.mmap]:
    """A file without a name, in memory where the system can: its descriptor, and what maps it."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("maestream")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file, mmap.mmap(file, size)


def _explain(problem: Exception, where: str) -> str:
    if isinstance(problem, UserError):
        return str(problem)
    if isinstance(problem, FileNotFoundError):
        return f"{where} {MISSING}"
    traceback.print_exception(problem)
    return f"{where}: {type(problem).__name__}: {problem}"


def main() -> None:
    answers = socket.socket(fileno=int(sys.argv[1]))
    job = json.loads(sys.argv[2])
    storage.DEADLINE_S, storage.STALL_S = job.pop("deadline_s"), job.pop("stall_s")  # as its worker has them
    fetching = Fetching(answers, **job)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        number = request.pop("number")
        if "whole" in request:
            fetching.begin_whole(number, request["whole"])
        else:
            ranges = [Range(*r) for r in request.pop("ranges")]
            fetching.begin_ranges(number, ranges, **request)
    # The worker has closed, or has died. Half a chunk is not left behind; anything else may be.
    with fetching.keeping:
        os._exit(0)


if __name__ == "__main__":
    main()
