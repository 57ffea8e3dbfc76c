"""The fetcher: a process beside each worker that reads storage, so that network, TLS and disk never take the
worker's interpreter lock. It is started with exec, never forked, and ends when its worker does.

A request names byte ranges, and the buffer in which they are to lie end to end: an anonymous file
(memfd_create(2)) that both map, so nothing is copied between the two, nothing has a name, and nothing is
left over whoever dies. The fetcher makes a buffer when it first hears of it.

    its stdin:      requests, a line of JSON each; the end of it is the end of the worker
    a socket pair:  answers, a header each, with a new file's descriptor or an error's text

This module is the worker's side; `pipeline.fetching` is the process.
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

from pipeline import storage
from pipeline.buffers import Buffer, Buffers
from pipeline.cache import KeptPart
from pipeline.errors import UserError

RESTARTS = 5  # of a fetcher that dies, without an answer in between
# glibc gives memory of many megabytes back to the system at once, and the next body of an answer has to get it anew.
# Up to 32 MB, the most that glibc takes here, and in one pool, the fetcher keeps it (mallopt(3)).
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_ARENA_MAX": "1",
}
MISSING = "is missing: copy or build the dataset again (`maestream shards verify` names all that is wrong)"
HEADER = struct.Struct(
    "<qqqq"
)  # request, length of an error's text, bytes read from storage and from the kept part
NOTICE = -1  # the "request" of a text that answers none, but is to be seen
log = logging.getLogger("maestream")


class Range(NamedTuple):
    """`size` bytes of a shard from byte `start`."""

    name: str
    start: int
    size: int
    # For the kept part: the shard's number, its size, and the number of its first chunk over the whole dataset.
    shard: int
    shard_bytes: int
    first_chunk: int


class Answer(NamedTuple):
    request: int
    error: str | None
    mapping: mmap.mmap | None  # of a file that is new
    storage_bytes: int
    kept_bytes: int


class Request(NamedTuple):
    line: str
    future: "Future[memoryview]"
    buffer: Buffer | None  # None: whatever the answer brings
    size: int  # bytes in the buffer


class Fetcher:
    """Reads of one dataset. Safe to use from several threads.

    Args:
        shards_url: where the shards lie.
        indexes_url: where the indexes lie.
        kept: the kept part, if there is one.
        spare_bytes: memory that waits to be filled again, see `pipeline.buffers`.
    """

    def __init__(
        self, shards_url: str, indexes_url: str, kept: KeptPart | None = None, spare_bytes: int = 0
    ) -> None:
        kept_part = asdict(kept) if kept else None
        patience = {"deadline_s": storage.DEADLINE_S, "stall_s": storage.STALL_S}
        self.job = json.dumps(
            {"shards_url": shards_url, "indexes_url": indexes_url, "kept": kept_part} | patience
        )
        self.storage_bytes = 0  # read from storage so far
        self.kept_bytes = 0  # read from the kept part so far
        self.lock = threading.Lock()
        self.buffers = Buffers(spare_bytes)
        self.waiting: dict[int, Request] = {}
        self.requests = 0
        self.closing = False
        self.failure: UserError | None = None  # for which no other process is started any more
        _allow_files()
        self._start()
        self.receiver = threading.Thread(target=self._receive, name="fetcher", daemon=True)
        self.receiver.start()

    def ranges(self, ranges: Sequence[Range], keep: bool) -> "Future[memoryview]":
        """Begin to read ranges: they will lie end to end. UserError where storage refuses for good.

        `keep`: chunks that belong to the kept part are read whole, and kept.
        """
        size = sum(r.size for r in ranges)
        with self.lock:
            buffer, given_up = self.buffers.take(size)
            where = {"buffer": buffer.number, "capacity": buffer.capacity, "given_up": given_up}
            return self._request({"ranges": ranges, "keep": keep, **where}, buffer, size)

    def whole(self, name: str) -> "Future[memoryview]":
        """Begin to read the whole of an index, before all ranges that still wait."""
        with self.lock:
            return self._request({"whole": name}, None, 0)

    def close(self) -> None:
        """End the process. What is under way is cancelled."""
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
        self.waiting[number] = Request(line, future, buffer, size)
        self._send(line)
        return future

    def _start(self) -> None:
        self.answers, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.fetching", str(theirs.fileno()), self.job],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is the worker's: it would end this one while it still starts, with a traceback.
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
        with contextlib.suppress(OSError):  # it has died: `_receive` starts another and sends all again
            self.requests_pipe.write(line.encode() + b"\n")
            self.requests_pipe.flush()

    def _receive(self) -> None:
        """Settle what is answered; a fetcher that dies is started again, with all that it had to do."""
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
                        f"the fetcher process ends again and again (status {status}): see what it printed, "
                        "and whether the machine has memory left"
                    )
                    break
                restarts += 1
                log.warning("the fetcher process has ended (status %d): starting another", status)
                self._start()
                for request in self.waiting.values():
                    self._send(request.line)
        for request in self.waiting.values():
            if self.failure:
                request.future.set_exception(self.failure)
            else:
                request.future.cancel()

    def _settle(self, answer: Answer) -> None:
        self.storage_bytes += answer.storage_bytes
        self.kept_bytes += answer.kept_bytes
        if answer.request == NOTICE:
            log.warning("%s", answer.error)
            return
        _, future, buffer, size = self.waiting.pop(answer.request)
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


def _allow_files() -> None:
    """Each buffer is an open file, in both processes: more than the 1024 that are usual, with many lanes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def send_answer(
    answers: socket.socket, request: int, text: str | None, file: int | None, storage: int, kept: int
) -> None:
    """What `_receive_answer` receives."""
    data = text.encode() if text is not None else b""
    header = HEADER.pack(request, len(data) if text is not None else -1, storage, kept)
    socket.send_fds(answers, [header], [file] if file is not None else [])
    answers.sendall(data)


def _receive_answer(answers: socket.socket) -> Answer | None:
    """The next answer, None when there will be no more."""
    try:
        # At most a header at a time, so the descriptor that comes along is its own.
        header, files, _, _ = socket.recv_fds(answers, HEADER.size, 1)
        while header and len(header) < HEADER.size:
            if not (more := answers.recv(HEADER.size - len(header))):
                return None
            header += more
        if not header:
            return None
        request, length, storage, kept = HEADER.unpack(header)
        text = answers.recv(length, socket.MSG_WAITALL).decode() if length > 0 else ""
    except ConnectionError:
        return None
    mapping = None
    if files:
        if size := os.fstat(files[0]).st_size:
            mapping = mmap.mmap(files[0], size, prot=mmap.PROT_READ)
        os.close(files[0])
    return Answer(request, None if length < 0 else text, mapping, storage, kept)
