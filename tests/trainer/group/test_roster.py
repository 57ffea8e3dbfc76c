"""The roster decides who trains together: workers never disagree, nobody who is dead is a member, and nobody waits for ever."""

import threading
import time
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trainer.group.rendezvous import Address, Generation
from trainer.group.roster import Roster

WAIT_S = 5  # a worker that has not returned after so long waits for ever


def address_of(member: str) -> Address:
    return Address((f"{member}.store", 1), (f"{member}.gloo", 2))


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


class CheckIn(threading.Thread):
    """A worker that waits for the next generation."""

    def __init__(self, roster: Roster, member: str) -> None:
        super().__init__(daemon=True)
        self.roster, self.member = roster, member
        self.result: Generation | None = None
        self.start()

    def run(self) -> None:
        self.result = self.roster.check_in(self.member, address_of(self.member))

    def wait(self) -> Generation | None:
        self.join(WAIT_S)
        assert not self.is_alive(), f"{self.member} waits for ever"
        return self.result


def check_in(roster: Roster, members: list[str]) -> list[Generation | None]:
    """Check in at the same time, in this order."""
    workers = []
    for member in members:
        workers.append(worker := CheckIn(roster, member))
        until(lambda member=member, worker=worker: member in roster.waiting or not worker.is_alive())
    return [worker.wait() for worker in workers]


class Job(RuleBasedStateMachine):
    """A job in which workers check in, join, leave and die at any moment, next to a model of what has to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.roster = Roster()
        self.names = 0
        self.training: set[str] = set()  # have no part in a rendezvous
        self.waiting: dict[str, CheckIn] = {}
        self.expected: set[str] = set()
        self.before: list[str] = []  # members of the generation before, by rank
        self.least = 1
        self.gone: set[str] = set()
        self.newest = 0

    def new_names(self, count: int) -> list[str]:
        self.names += count
        return [f"w{i}" for i in range(self.names - count, self.names)]

    @initialize(count=st.integers(1, 5), data=st.data())
    def begins(self, count: int, data: st.DataObject) -> None:
        self.starts(count, data.draw(st.integers(1, count)))

    @rule(count=st.integers(1, 4), least=st.integers(1, 3))
    def starts(self, count: int, least: int) -> None:
        old, self.waiting = self.waiting, {}
        self.gone |= self.training | set(old)
        self.before, self.least = self.new_names(count), min(least, count)
        self.training, self.expected = set(self.before), set(self.before)
        self.roster.start(self.before, self.least)
        assert not any(worker.wait() for worker in old.values())

    @precondition(lambda self: self.training)
    @rule(data=st.data())
    def checks_in(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(sorted(self.training)))
        self.training.remove(member)
        self.waiting[member] = CheckIn(self.roster, member)

    @rule()
    def joins(self) -> None:
        [member] = self.new_names(1)
        self.waiting[member] = CheckIn(self.roster, member)

    @precondition(lambda self: self.training)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(sorted(self.training)))
        self.removed(member)
        assert self.roster.check_in(member, address_of(member), leaving=True) is None

    @precondition(lambda self: self.training or self.waiting)
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(sorted(self.training | set(self.waiting))))
        worker = self.waiting.get(member)
        self.removed(member)
        self.roster.remove(member)
        assert worker is None or worker.wait() is None

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def returns_though_it_is_dead(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(sorted(self.gone)))
        assert CheckIn(self.roster, member).wait() is None

    def removed(self, member: str) -> None:
        self.training.discard(member)
        self.waiting.pop(member, None)
        self.expected.discard(member)
        self.gone.add(member)

    @invariant()
    def a_generation_is_announced_when_all_are_there_and_only_then(self) -> None:
        due = self.expected <= set(self.waiting) and len(self.waiting) >= self.least and self.waiting
        if not due:
            # Those that have just called are there soon; then nothing may have happened.
            until(lambda: self.roster.waiting.keys() == self.waiting.keys())
            assert self.roster.number == self.newest
            status = self.roster.status()
            assert status.joining == self.waiting.keys() - self.expected
            assert (status.number, status.removed) == (self.newest, self.gone)
            return
        generations = [worker.wait() for worker in self.waiting.values()]
        generation = generations[0]
        assert generation is not None
        assert all(other == generation for other in generations)
        assert generation.number == self.newest + 1
        assert sorted(generation.members) == sorted(self.waiting)
        assert not self.gone & set(generation.members)
        assert generation.addresses == tuple(address_of(member) for member in generation.members)
        check_ranks(self.before, list(generation.members))
        self.newest, self.before = generation.number, list(generation.members)
        self.expected, self.training, self.waiting = set(self.before), set(self.before), {}

    def teardown(self) -> None:
        # Once all that are left have checked in, and as many as are needed, nobody waits.
        for member in sorted(self.training):
            self.waiting[member] = CheckIn(self.roster, member)
        for member in self.new_names(max(0, self.least - len(self.waiting))):
            self.waiting[member] = CheckIn(self.roster, member)
        generations = {worker.wait() for worker in self.waiting.values()}
        assert len(generations) == 1
        assert None not in generations
        # The end of the run releases those that wait, and those that come too late.
        late = CheckIn(self.roster, f"w{self.names}")
        until(lambda: self.roster.status().joining)
        self.roster.finish()
        assert late.wait() is None
        assert CheckIn(self.roster, f"w{self.names + 1}").wait() is None


def check_ranks(before: list[str], members: list[str]) -> None:
    """Rank 0 is a former member if one is left, and as many as possible keep their rank."""
    stay = [member for member in before if member in members]
    if not stay:
        return
    assert members[0] in stay
    can_keep = [member for member in stay if before.index(member) < len(members)]
    kept = sum(before.index(member) == rank for rank, member in enumerate(members) if member in before)
    rank_0_is_taken_by_one_that_could_keep = before[0] not in stay and can_keep == stay
    assert kept == len(can_keep) - rank_0_is_taken_by_one_that_could_keep


TestJob = Job.TestCase
TestJob.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    ("before", "lost", "joining", "after"),
    [
        ("abc", "c", "", "ab"),
        ("abc", "b", "", "ac"),
        ("abc", "a", "", "cb"),  # b keeps its rank
        ("abcd", "b", "", "adc"),  # c too
        ("abc", "b", "d", "adc"),
        ("abc", "a", "d", "cbd"),  # rank 0 is never one that joins
        ("abc", "ab", "de", "cde"),
        ("abc", "", "de", "abcde"),
        ("abcd", "bc", "", "ad"),
        ("ab", "ab", "dc", "dc"),  # nobody is left of those before
    ],
)
def test_survivors_keep_their_ranks(before: str, lost: str, joining: str, after: str) -> None:
    roster = Roster()
    roster.start(list(before), 1)
    first = check_in(roster, list(before))
    assert {generation.members for generation in first} == {tuple(before)}
    for member in lost[:-1]:
        roster.remove(member)
    workers = []
    for member in joining:
        workers.append(CheckIn(roster, member))
        until(lambda: len(roster.status().joining) == len(workers))
    workers += [CheckIn(roster, member) for member in reversed(before) if member not in lost]
    if lost:
        until(lambda: len(roster.waiting) == len(workers))
        roster.remove(lost[-1])
    generations = [worker.wait() for worker in workers]
    assert {"".join(generation.members) for generation in generations} == {after}


def test_ranks_at_the_start_are_those_of_the_list_and_not_of_the_arrivals() -> None:
    roster = Roster()
    roster.start(["a", "b", "c"], 1)
    assert {generation.members for generation in check_in(roster, ["c", "a", "b"])} == {("a", "b", "c")}


def test_workers_that_are_there_before_the_start_are_not_forgotten() -> None:
    roster = Roster()
    early = CheckIn(roster, "a")
    until(lambda: roster.waiting)
    roster.start(["a"], 1)
    assert early.wait() == Generation(1, ("a",), (address_of("a"),))


def test_too_few_workers_wait_for_others_to_join() -> None:
    roster = Roster()
    roster.start(["a", "b"], 2)
    check_in(roster, ["a", "b"])
    roster.remove("b")
    left = CheckIn(roster, "a")
    left.join(0.1)
    assert left.is_alive()
    joined = CheckIn(roster, "c")
    assert left.wait() == joined.wait()
    assert left.wait().members == ("a", "c")


def test_one_that_joins_waits_until_the_members_check_in() -> None:
    roster = Roster()
    roster.start(["a"], 1)
    check_in(roster, ["a"])
    joined = CheckIn(roster, "b")
    until(lambda: roster.status().joining)
    assert joined.is_alive()
    [generation] = check_in(roster, ["a"])
    assert joined.wait() is generation
    assert not roster.status().joining
