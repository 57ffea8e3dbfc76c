"""A proxy between S3 clients and the tests' S3 server that injects faults.

It runs in a thread, and parses just enough HTTP to affect single requests: a test sets which share of the requests gets
which fault, and a retried request usually succeeds.
"""

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

HOST = "127.0.0.1"
# reset, short, stall: the response is cut after a random number of bytes; then the connection is reset (RST), closed (FIN)
# or kept open.
# trickle: the response arrives byte by byte.
# bytes: sent as the response, in place of the server's. A function gets the request's first line and returns such bytes,
# or None for no fault.
Fault = Literal["reset", "short", "stall", "trickle"] | bytes | Callable[[str], bytes | None]


def answer(status: str, body: bytes) -> bytes:
    """An HTTP response."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def s3_error(status: str, code: str) -> bytes:
    """An HTTP response with an error of S3."""
    return answer(status, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())


SLOW_DOWN = s3_error("503 Slow Down", "SlowDown")


@dataclass
class FaultProxy:
    """Listens on `port`. `share`, `faults` and `latency_s` can be changed at any time."""

    upstream: int  # the port of the S3 server
    rng: random.Random
    port: int = 0
    share: float = 0.0  # of requests that get a fault
    faults: Sequence[Fault] = ()  # chosen at random
    latency_s: float = 0.0  # added to each request
    refused_header: bytes = b""  # beginning of the name of a header: a request with it is answered with 501
    requests: list[str] = field(default_factory=list)  # first lines
    injected: int = 0  # requests that got a fault
    connections: set[asyncio.StreamWriter] = field(default_factory=set)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    server: asyncio.Server | None = None

    def stop_faults(self) -> None:
        self.share, self.faults, self.latency_s = 0.0, (), 0.0

    def refuse(self) -> None:
        """Reset open connections, and refuse new ones until `accept`."""
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(10)

    def accept(self) -> None:
        asyncio.run_coroutine_threadsafe(self._listen(), self.loop).result(10)

    async def _listen(self) -> None:
        if self.server and self.server.is_serving():
            return
        self.server = await asyncio.start_server(self._serve, HOST, self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self.server:
            self.server.close()
        for writer in self.connections:
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection(HOST, self.upstream)
            with contextlib.closing(up_writer):
                while await self._exchange(reader, writer, up_reader, up_writer):
                    pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # client or server closed the connection
        finally:
            self.connections.discard(writer)
            writer.close()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> bool:
        """Forward one request and its response. Returns whether the connection stays open."""
        request = await reader.readuntil(b"\r\n\r\n")
        first_line = request.partition(b"\r\n")[0].decode()
        self.requests.append(first_line)
        fault = self.rng.choice(self.faults) if self.rng.random() < self.share else None
        if callable(fault):
            fault = fault(first_line)
        if self.refused_header and b"\r\n" + self.refused_header in request.lower():
            fault = s3_error("501 Not Implemented", "NotImplemented")
        self.injected += fault is not None
        await asyncio.sleep(self.latency_s)
        if isinstance(fault, bytes):
            writer.write(fault)
            await writer.drain()
            return False
        size = _content_length(request)
        if b"\r\nexpect: 100-continue\r\n" in request.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request = re.sub(rb"expect: 100-continue\r\n", b"", request, flags=re.IGNORECASE)
        if size and fault in ("reset", "short") and self.rng.random() < 0.5:
            await reader.readexactly(self.rng.randrange(size))  # uploads are cut off as well
            _reset(writer)
            return False
        up_writer.write(request)
        while size:
            part = await reader.read(min(size, 1 << 20))
            if not part:
                return False
            up_writer.write(part)
            await up_writer.drain()
            size -= len(part)
        response = await up_reader.readuntil(b"\r\n\r\n")
        if not first_line.startswith("HEAD"):
            response += await _body(up_reader, response)
        while fault == "trickle" and response:
            writer.write(response[:1])
            response = response[1:]
            await asyncio.sleep(0.05)
        if fault is None:
            writer.write(response)
            await writer.drain()
            return b"\r\nconnection: close" not in response.lower()
        writer.write(response[: self.rng.randrange(len(response))])
        await writer.drain()
        if fault == "reset":
            await asyncio.sleep(0.05)  # RST also discards what the client has not read yet
            _reset(writer)
        if fault == "stall":
            await reader.read()  # until the client closes the connection
        return False


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    if b"\r\ntransfer-encoding: chunked" not in head.lower():
        return await reader.readexactly(_content_length(head))
    body = b""
    while not body.endswith(b"0\r\n\r\n"):
        line = await reader.readuntil(b"\r\n")
        body += line + await reader.readexactly(int(line.partition(b";")[0], 16) + 2)
    return body


def _content_length(head: bytes) -> int:
    assert b"\r\ntransfer-encoding:" not in head.lower(), head
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return int(found[1]) if found else 0


def _reset(writer: asyncio.StreamWriter) -> None:
    no_linger = struct.pack("ii", 1, 0)  # makes close(2) send RST
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
    writer.transport.abort()


@contextlib.contextmanager
def fault_proxy(upstream: int, seed: int = 0) -> Iterator[FaultProxy]:
    """A proxy, without faults at first, of the S3 server on the local port `upstream`."""
    proxy = FaultProxy(upstream, random.Random(seed))
    thread = threading.Thread(target=proxy.loop.run_forever, name="fault proxy")
    thread.start()
    try:
        proxy.accept()
        yield proxy
    finally:
        proxy.refuse()
        asyncio.run_coroutine_threadsafe(_end_tasks(), proxy.loop).result(10)
        proxy.loop.call_soon_threadsafe(proxy.loop.stop)
        thread.join()
        proxy.loop.close()


async def _end_tasks() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
