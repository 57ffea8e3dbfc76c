"""gloo process groups that can be aborted.

`ProcessGroupGloo.abort` does nothing (torch 2.13): a worker that waits for one that is stuck, or for one that waits for it in
turn, would wait until the timeout. Here `abort` shuts down the group's connections instead. Then operations fail at once, on
this worker and on those at the other end.
"""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)  # of an operation; the loss of a worker is noticed in other ways
CONNECT_TIMEOUT = timedelta(seconds=10)  # for all workers of a group to connect
INTERFACE = "GLOO_SOCKET_IFNAME"  # the variable by which users name the network interface, as in torch
Endpoint = tuple[str, int]  # IP address and port


class GlooDevice:
    """A worker's endpoint for gloo groups, which is the same for all generations.

    Args:
        host: the address of this machine that the other workers reach.
    """

    def __init__(self, host: str) -> None:
        before = set(_listening())
        if interface := os.environ.get(INTERFACE):
            self.device = dist.ProcessGroupGloo.create_device(interface=interface)
        else:
            self.device = dist.ProcessGroupGloo.create_device(hostname=host)
        # torch does not tell the port. It is that of the socket that has just begun to listen.
        self.endpoint = next(endpoint for endpoint in _listening() if endpoint not in before)

    def connect(self, store: dist.Store, rank: int, size: int) -> dist.ProcessGroupGloo:
        """Connect to the other workers of a group. Raises RuntimeError if one is not reached within CONNECT_TIMEOUT."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [self.device]
        options._timeout = CONNECT_TIMEOUT  # instead of the store's
        group = dist.ProcessGroupGloo(store, rank, size, options)
        group._set_default_timeout(TIMEOUT)
        return group

    def abort(self, others: Sequence[Endpoint]) -> None:
        """Shut down all connections with workers at these endpoints, so that operations of their group fail at once."""
        for connection in _sockets():
            with contextlib.suppress(OSError):  # it listens, or is closed already
                here, there = connection.getsockname()[:2], connection.getpeername()[:2]
                if here == self.endpoint or there in others:
                    connection.shutdown(socket.SHUT_RDWR)


def _listening() -> Iterator[Endpoint]:
    """Yield the endpoints at which this process listens."""
    for connection in _sockets():
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            yield connection.getsockname()[:2]


def _sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of each TCP socket of this process; it is closed again after its turn."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    yield copy
