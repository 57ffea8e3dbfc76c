"""A proxy between an S3 client and the tests' S3 server that does harm on purpose.

It runs in a thread, and knows HTTP just well enough to harm one request at a time: so a client that tries
again gets on, and a test can say which share of all requests meets what.
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
# reset, short, stall: the answer ends after a random number of bytes; with RST, with FIN, not at all.
# trickle: it comes byte by byte.
# Bytes, or what makes them of the request's first line, are answered in the server's place; None lets it through.
Harm = Literal["reset", "short", "stall", "trickle"] | bytes | Callable[[str], bytes | None]


def answer(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def s3_error(status: str, code: str) -> bytes:
    return answer(status, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())


SLOW_DOWN = s3_error("503 Slow Down", "SlowDown")


@dataclass
class FaultProxy:
    """Listens on `port`. What it does may be changed at any time."""

    upstream: int  # port
    rng: random.Random
    port: int = 0
    share: float = 0.0  # of requests that are harmed
    harms: Sequence[Harm] = ()  # one of these
    latency_s: float = 0.0
    requests: list[str] = field(default_factory=list)  # first lines
    harmed: int = 0
    connections: set[asyncio.StreamWriter] = field(default_factory=set)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    server: asyncio.Server | None = None

    def calm(self) -> None:
        self.share, self.harms, self.latency_s = 0.0, (), 0.0

    def refuse(self) -> None:
        """Refuse connections, and break those that are open, until `accept`."""
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
            pass  # one of the two has gone
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
        """One request and its answer. Whether the connection lives on."""
        request = await reader.readuntil(b"\r\n\r\n")
        first_line = request.partition(b"\r\n")[0].decode()
        self.requests.append(first_line)
        harm = self.rng.choice(self.harms) if self.rng.random() < self.share else None
        if callable(harm):
            harm = harm(first_line)
        self.harmed += harm is not None
        await asyncio.sleep(self.latency_s)
        if isinstance(harm, bytes):
            writer.write(harm)
            await writer.drain()
            return False
        size = _content_length(request)
        if b"\r\nexpect: 100-continue\r\n" in request.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request = re.sub(rb"expect: 100-continue\r\n", b"", request, flags=re.IGNORECASE)
        if size and harm in ("reset", "short") and self.rng.random() < 0.5:
            await reader.readexactly(self.rng.randrange(size))  # what is written gets half-way, too
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
        while harm == "trickle" and response:
            writer.write(response[:1])
            response = response[1:]
            await asyncio.sleep(0.05)
        if harm is None:
            writer.write(response)
            await writer.drain()
            return b"\r\nconnection: close" not in response.lower()
        writer.write(response[: self.rng.randrange(len(response))])
        await writer.drain()
        if harm == "reset":
            await asyncio.sleep(0.05)  # RST also discards what the client has not read yet
            _reset(writer)
        if harm == "stall":
            await reader.read()  # until the client has gone
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
    no_linger = struct.pack("ii", 1, 0)  # close(2) sends RST then
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
    writer.transport.abort()


@contextlib.contextmanager
def fault_proxy(upstream: int, seed: int = 0) -> Iterator[FaultProxy]:
    """A proxy of `upstream`, a port of this machine, that does no harm yet."""
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
