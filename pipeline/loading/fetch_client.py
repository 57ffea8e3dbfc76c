"""The worker's side of the fetch process.

Each worker has one fetch process, which reads storage for it, so that network, TLS and disk never take the worker's
GIL. It is started with exec, never forked, and ends when its worker ends. If it dies, it is started again and gets
all unanswered requests again; after RESTARTS restarts without an answer in between, the run stops with an error.

    worker                                                    fetch process (`pipeline.loading.fetch_process`)
    stdin        one JSON object per line for each request →
    socket pair                                             ← for each answer a header, and a file descriptor or
                                                              the text of an error
    buffers      anonymous files (memfd_create(2)), mapped by both

A request names byte ranges of shards and the buffer to put them in, end to end. The fetch process creates a buffer
when a request first names it, and sends its file descriptor with the answer. So the bytes are not copied between the
processes, and since a buffer has no name in any file system, nothing is left over when a process is killed. The end
of stdin tells the fetch process that its worker has ended.
"""

import contextlib
import json
import logging
import mmap
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.loading.buffer_pool import Buffer, BufferPool
from pipeline.loading.disk_cache import DiskCache
from pipeline.storage import store as storage

RESTARTS = 5  # of a fetch process that dies without answering anything
# By default glibc returns large allocations to the system at once, and the next response body has to allocate them
# again. With these settings the fetch process reuses allocations of up to 32 MB (the most that glibc allows), in one
# pool (mallopt(3)).
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_ARENA_MAX": "1",
}
MISSING = (
    "is missing: copy or build the dataset again (`maestream shards verify` lists everything that is wrong)"
)
# Of an answer: request number; length of the error's text, −1 if none; bytes read from storage; bytes read from the cache.
HEADER = struct.Struct("<qqqq")
WARNING = -1  # request number of a text that answers no request but is logged as a warning
log = logging.getLogger("maestream")


class Range(NamedTuple):
    """`size` bytes of a shard from byte `start`."""

    name: str
    start: int
    size: int
    # For the disk cache:
    shard: int  # number of the shard
    shard_bytes: int  # its size
    first_chunk: int  # number of its first chunk over the whole dataset


class Answer(NamedTuple):
    request: int
    error: str | None
    mapping: mmap.mmap | None  # of a new buffer
    storage_bytes: int
    cached_bytes: int


class Request(NamedTuple):
    line: str
    future: "Future[memoryview]"
    buffer: Buffer | None  # None: the answer comes with memory of its own
    size: int  # bytes to put into the buffer


class Fetcher:
    """Starts a fetch process and sends it requests for one dataset. Safe to use from several threads.

    Args:
        shards_url: folder of the shards.
        indexes_url: folder of the indexes.
        disk_cache: where to look for chunks before reading them from storage, if anywhere.
        spare_bytes: size of free buffers to keep, see `pipeline.loading.buffer_pool`.
    """

    def __init__(
        self, shards_url: str, indexes_url: str, disk_cache: DiskCache | None = None, spare_bytes: int = 0
    ) -> None:
        self.job = json.dumps(
            {
                "shards_url": shards_url,
                "indexes_url": indexes_url,
                "disk_cache": asdict(disk_cache) if disk_cache else None,
                "deadline_s": storage.DEADLINE_S,
                "stall_s": storage.STALL_S,
            }
        )
        self.storage_bytes = 0  # read from storage so far
        self.cached_bytes = 0  # read from the disk cache so far
        self.lock = threading.Lock()
        self.buffers = BufferPool(spare_bytes)
        self.unanswered: dict[int, Request] = {}
        self.requests = 0  # made so far
        self.closing = False
        self.failure: UserError | None = None  # why the process is not started again any more
        _raise_open_files_limit()
        self._start()
        self.receiver = threading.Thread(target=self._receive, name="fetcher", daemon=True)
        self.receiver.start()

    def read_ranges(self, ranges: Sequence[Range], fill_cache: bool) -> "Future[memoryview]":
        """Start to read ranges. The result holds their bytes end to end, or raises UserError if storage refuses them
        for good.

        Args:
            fill_cache: read chunks that belong to the disk cache as a whole, and write them to it.
        """
        size = sum(r.size for r in ranges)
        with self.lock:
            buffer, to_free = self.buffers.take(size)
            where = {"buffer": buffer.number, "capacity": buffer.capacity, "to_free": to_free}
            return self._request({"ranges": ranges, "fill_cache": fill_cache, **where}, buffer, size)

    def read_file(self, name: str) -> "Future[memoryview]":
        """Start to read a whole file from the folder of the indexes, ahead of ranges that are still queued."""
        with self.lock:
            return self._request({"file": name}, None, 0)

    def close(self) -> None:
        """End the process and cancel unanswered requests."""
        with self.lock:
            self.closing = True
            with contextlib.suppress(OSError):
                self.requests_pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.receiver.join()

    def _request(self, request: dict[str, object], buffer: Buffer | None, size: int) -> "Future[memoryview]":
        future: Future[memoryview] = Future()
        if self.closing:
            future.cancel()
            return future
        if self.failure:
            future.set_exception(self.failure)
            return future
        number, self.requests = self.requests, self.requests + 1
        line = json.dumps({"number": number, **request})
        self.unanswered[number] = Request(line, future, buffer, size)
        self._send(line)
        return future

    def _start(self) -> None:
        self.answers, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "pipeline.loading.fetch_process",
                    str(theirs.fileno()),
                    self.job,
                ],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is for the worker only: it could end this process during its start, with a traceback.
                process_group=0,
                env={
                    **os.environ,
                    **MALLOC,
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                },
            )
        assert self.process.stdin is not None
        self.requests_pipe = self.process.stdin

    def _send(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the process has died: `_receive` restarts it and sends all again
            self.requests_pipe.write(line.encode() + b"\n")
            self.requests_pipe.flush()

    def _receive(self) -> None:
        """Handle answers, in a thread of its own. Restart the process if it dies, and send all unanswered requests."""
        restarts = 0
        while True:
            with self.answers:
                while (answer := _receive_answer(self.answers)) is not None:
                    self._settle(answer)
                    restarts = 0
            with self.lock:
                status = self.process.wait()
                if self.closing:
                    break
                if restarts == RESTARTS:
                    self.failure = UserError(
                        f"the fetch process dies again and again (exit status {status}): see its output above, and "
                        "check that the machine has free memory"
                    )
                    break
                restarts += 1
                log.warning("the fetch process died (exit status %d): restarting it", status)
                self._start()
                for request in self.unanswered.values():
                    self._send(request.line)
        for request in self.unanswered.values():
            if self.failure:
                request.future.set_exception(self.failure)
            else:
                request.future.cancel()

    def _settle(self, answer: Answer) -> None:
        self.storage_bytes += answer.storage_bytes
        self.cached_bytes += answer.cached_bytes
        if answer.request == WARNING:
            log.warning("%s", answer.error)
            return
        _, future, buffer, size = self.unanswered.pop(answer.request)
        if buffer and answer.mapping is not None:
            buffer.mapping = answer.mapping
        if answer.error is None:
            if buffer:
                future.set_result(self.buffers.lend(buffer, size))
            else:
                future.set_result(memoryview(answer.mapping or b""))
        else:
            if buffer:
                self.buffers.give_back(buffer)
            future.set_exception(UserError(answer.error))


def _raise_open_files_limit() -> None:
    """Raise this process's limit of open files. Each buffer is an open file in both processes, and with many lanes
    that is more than the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def send_answer(
    answers: socket.socket,
    request: int,
    error: str | None = None,
    file: int | None = None,
    storage_bytes: int = 0,
    cached_bytes: int = 0,
) -> None:
    """Send an answer, in the fetch process. `file`: descriptor of a new buffer."""
    text = error.encode() if error is not None else b""
    header = HEADER.pack(request, len(text) if error is not None else -1, storage_bytes, cached_bytes)
    socket.send_fds(answers, [header], [file] if file is not None else [])
    answers.sendall(text)


def _receive_answer(answers: socket.socket) -> Answer | None:
    """The next answer; None when the process has ended."""
    try:
        # Receive at most one header at a time, so that the descriptor that comes with it belongs to it.
        header, files, _, _ = socket.recv_fds(answers, HEADER.size, 1)
        while header and len(header) < HEADER.size:
            if not (more := answers.recv(HEADER.size - len(header))):
                return None
            header += more
        if not header:
            return None
        request, length, storage_bytes, cached_bytes = HEADER.unpack(header)
        text = answers.recv(length, socket.MSG_WAITALL).decode() if length > 0 else ""
    except ConnectionError:
        return None
    mapping = None
    if files:
        if size := os.fstat(files[0]).st_size:
            mapping = mmap.mmap(files[0], size, prot=mmap.PROT_READ)
        os.close(files[0])
    return Answer(request, None if length < 0 else text, mapping, storage_bytes, cached_bytes)
