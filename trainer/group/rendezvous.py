"""How workers agree on who trains together.

A *generation* is a set of workers that trains together, with their ranks. It ends when a worker is lost, leaves or joins.
Then all that are left meet at a rendezvous, which announces the next generation once everybody that it expects is there.
"""

from dataclasses import dataclass
from typing import Protocol

from trainer.group.gloo import Endpoint


class WorkerLost(Exception):  # noqa: N818  # not an error: the group can be rebuilt
    """The group has lost a worker. The operation that was running has no result."""


@dataclass(frozen=True)
class Address:
    """Where a worker is reached by others."""

    store: Endpoint  # its TCPStore, through which a generation connects if this worker is its rank 0
    gloo: Endpoint  # its gloo device


@dataclass(frozen=True)
class Generation:
    """A set of workers that trains together."""

    number: int  # counted from 1 in a job
    members: tuple[str, ...]  # names of the workers, by rank
    addresses: tuple[Address, ...]  # by rank


class Rendezvous(Protocol):
    """Where the workers of a job meet."""

    def check_in(self, member: str, address: Address, leaving: bool) -> Generation | None:
        """Wait for the next generation and return it; None for a worker that leaves, and when the run is finished.

        Args:
            leaving: this worker will not be a member, and the others need not wait for it.
        """

    def finish(self) -> None:
        """Say that the run is finished: nobody is needed any more."""
