"""The list of a job's workers, and the rendezvous at which it is decided who trains together.

One object in one process decides, so workers can never disagree, and after a network partition only the side that reaches it
goes on. It decides without timeouts: a generation is announced when every worker that it expects has checked in. Which
workers are dead is told by `remove`; in a job that is Ray's view.
"""

import threading
import time
from dataclasses import dataclass, field

from trainer.group.rendezvous import Address, Generation

OVERDUE_S = 2.0


@dataclass(frozen=True)
class Status:
    """Who trains and who wants to."""

    number: int  # of the newest generation
    members: tuple[str, ...]  # of it, by rank
    removed: frozenset[str]  # dead, or gone
    joining: frozenset[str]  # ready to join; they do when the members check in
    overdue: frozenset[str]  # have not checked in, although another member did OVERDUE_S ago


@dataclass
class Roster:
    """Who trains, who waits, and who is expected. A `trainer.group.rendezvous.Rendezvous`; safe to use from many threads.

    Args:
        least: a generation has at least so many members; with fewer, workers wait for others to join.
    """

    least: int = 1
    members: list[str] = field(default_factory=list)  # of the newest generation, by rank
    expected: set[str] = field(default_factory=set)  # must check in before the next generation is announced
    waiting: dict[str, Address] = field(default_factory=dict)  # have checked in
    removed: set[str] = field(default_factory=set)  # dead, or gone
    generation: Generation | None = None
    number: int = 0  # of the newest generation
    first_at: float = 0.0  # time.monotonic() when the first member checked in for the next generation
    finished: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def start(self, members: list[str], least: int) -> None:
        """Expect these workers, and nobody else: all others have been ended."""
        with self.changed:
            self.removed |= {*self.members, *self.waiting} - set(members)
            self.waiting = {member: self.waiting[member] for member in members if member in self.waiting}
            self.members, self.expected, self.least = list(members), set(members), least
            self._announce()
            self.changed.notify_all()

    def check_in(self, member: str, address: Address, leaving: bool = False) -> Generation | None:
        """Wait for the next generation with this worker, see `Rendezvous.check_in`. None also if it has been removed."""
        with self.changed:
            if leaving:
                self._remove(member)
                return None
            if self.finished or member in self.removed:
                return None
            if member in self.expected and not self.waiting.keys() & self.expected:
                self.first_at = time.monotonic()
            self.waiting[member] = address
            before = self.number
            self._announce()
            self.changed.wait_for(
                lambda: (
                    self.finished
                    or member in self.removed
                    or (self.number > before and member not in self.waiting)
                )
            )
            return None if self.finished or member in self.removed else self.generation

    def remove(self, member: str) -> None:
        """Record that a worker is dead."""
        with self.changed:
            if member not in self.removed:
                self._remove(member)

    def status(self) -> "Status":
        """Return who trains and who wants to."""
        with self.changed:
            joining, missing = self.waiting.keys() - self.expected, self.expected - self.waiting.keys()
            late = self.waiting.keys() & self.expected and time.monotonic() - self.first_at > OVERDUE_S
            overdue = missing if late else set()
            members, removed = tuple(self.members), frozenset(self.removed)
            return Status(self.number, members, removed, frozenset(joining), frozenset(overdue))

    def finish(self) -> None:
        """Nobody is needed any more: the run has ended."""
        with self.changed:
            self.finished = True
            self.changed.notify_all()

    def _remove(self, member: str) -> None:
        self.removed.add(member)
        self.expected.discard(member)
        self.waiting.pop(member, None)
        self._announce()
        self.changed.notify_all()

    def _announce(self) -> None:
        """Announce the next generation if all that are expected are here. If none is left, it is those that join."""
        missing = self.expected - self.waiting.keys()
        if missing or len(self.waiting) < max(self.least, 1) or not self.members:  # not started yet
            return
        self.members = _ranks(self.members, list(self.waiting))
        self.number += 1
        addresses = tuple(self.waiting[member] for member in self.members)
        self.generation = Generation(self.number, tuple(self.members), addresses)
        self.expected, self.waiting = set(self.members), {}
        self.changed.notify_all()


def _ranks(before: list[str], arrivals: list[str]) -> list[str]:
    """Return the members of the next generation by rank: as many as possible keep their rank, so that they keep their lanes.

    Rank 0 is one of the members before, if there is one, because it knows the run's state.

    Args:
        before: the members before, by rank.
        arrivals: those that will be members, in the order in which they came.
    """
    stay = [member for member in before if member in arrivals]
    places = [member if member in stay else None for member in before[: len(arrivals)]]
    places += [None] * (len(arrivals) - len(places))
    if stay and places[0] is None:  # the last one that stays takes rank 0
        if stay[-1] in places:
            places[places.index(stay[-1])] = None
        places[0] = stay[-1]
    others = iter([member for member in dict.fromkeys([*stay, *arrivals]) if member not in places])
    return [place or next(others) for place in places]
