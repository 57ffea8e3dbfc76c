"""A group goes on after any loss: operations are right or raise WorkerLost, nobody hangs, and nothing else is touched."""

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.training.elastic import LOST, Workers, endless, operate, operations, rebuild
from trainer.group import gloo
from trainer.group.group import Group
from trainer.group.rendezvous import Address, Generation

SOON_S = 2.0  # from the news of a lost worker to the end of the operations of others, on a busy machine


def train_again(workers: Workers) -> None:
    """Rebuild, and check that all operations are right with exactly these workers."""
    workers.rebuild()
    assert workers.right(operations)


def lost_soon(workers: Workers) -> None:
    """Check that the actions of all that are left end with WorkerLost within SOON_S."""
    begin = time.monotonic()
    assert set(workers.answers().values()) == {LOST}
    assert time.monotonic() - begin < SOON_S


@pytest.mark.integration
def test_operations_are_right_with_any_number_of_workers_and_after_each_change() -> None:
    with Workers(1) as workers:
        train_again(workers)
        for _ in range(3):
            workers.join()
            train_again(workers)
        for name in ("w0", "w2"):  # rank 0, and another one
            workers.ask(name, rebuild, True)
            rest = [other for other in workers.names if other != name]
            for other in rest:
                workers.ask(other, rebuild)
            assert workers.answer(name) == ()
            workers.names = rest
            assert {tuple(sorted(members)) for members in workers.answers().values()} == {tuple(rest)}
            assert workers.right(operations)
        os.kill(workers.pid("w1"), signal.SIGKILL)
        workers.lose("w1")
        train_again(workers)  # alone


@pytest.mark.integration
@pytest.mark.parametrize("lost", ["w0", "w1", "w3"])
def test_all_survivors_notice_a_killed_worker_without_being_told(lost: str) -> None:
    """In a ring of four one of them is no neighbour of the lost one."""
    with Workers(4) as workers:
        train_again(workers)
        for name in workers.names:
            workers.ask(name, endless)
        time.sleep(0.1)
        os.kill(workers.pid(lost), signal.SIGKILL)
        workers.names.remove(lost)
        lost_soon(workers)
        workers.roster.remove(lost)
        train_again(workers)


@pytest.mark.integration
def test_a_stopped_worker_is_left_behind_when_it_is_declared_dead() -> None:
    with Workers(4) as workers:
        train_again(workers)
        for name in workers.names:
            workers.ask(name, endless)
        time.sleep(0.1)
        os.kill(workers.pid("w1"), signal.SIGSTOP)
        time.sleep(0.3)
        assert not any(workers.answered(name) for name in workers.names)  # they wait for it
        workers.lose("w1")
        lost_soon(workers)
        train_again(workers)
        # It comes back: it is no member, and it disturbs nobody.
        for name in workers.names:
            workers.ask(name, endless)
        os.kill(workers.pid("w1"), signal.SIGCONT)
        assert workers.answer("w1") == LOST
        workers.ask("w1", rebuild)
        assert workers.answer("w1") == ()
        time.sleep(0.1)
        assert not any(workers.answered(name) for name in workers.names)
        os.kill(workers.pid("w0"), signal.SIGKILL)
        workers.lose("w0")
        lost_soon(workers)


def only_check_in(group: Group) -> None:
    """Become a member of a generation without connecting to it."""
    assert group.rendezvous is not None
    group.rendezvous.check_in(group.member, group.address, False)


@pytest.mark.integration
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", ["w0", "w2"])  # the one through whose store they connect, and another one
def test_a_worker_may_be_lost_while_the_group_connects(lost: str, how: signal.Signals) -> None:
    with Workers(3) as workers:
        for name in workers.names:
            workers.ask(name, only_check_in if name == lost else rebuild)
        workers.answer(lost)
        os.kill(workers.pid(lost), how)
        time.sleep(0.2)
        assert not any(workers.answered(name) for name in workers.names if name != lost)
        begin = time.monotonic()
        workers.lose(lost)
        assert {tuple(sorted(members)) for members in workers.answers().values()} == {tuple(workers.names)}
        assert time.monotonic() - begin < SOON_S
        assert workers.right(operations)


def set_connect_timeout(group: Group, seconds: float) -> None:
    from datetime import timedelta

    from trainer.group import group as module

    gloo.CONNECT_TIMEOUT = module.CONNECT_TIMEOUT = timedelta(seconds=seconds)


@pytest.mark.integration
def test_workers_that_cannot_connect_try_again_though_nobody_is_declared_dead() -> None:
    with Workers(3) as workers:
        workers.all(set_connect_timeout, 1.0)
        for name in workers.names:
            workers.ask(name, only_check_in if name == "w1" else rebuild)
        workers.answer("w1")
        workers.ask("w1", rebuild)
        assert len(set(workers.answers().values())) == 1
        assert workers.right(operations)


# ---- what else a process has


_kept: list[Any] = []


def open_connections(group: Group, port: int) -> None:
    """Open connections that have nothing to do with the group: to another process, within this one, and a listening socket."""
    listening = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listening.getsockname())
    _kept[:] = [
        socket.create_connection(("127.0.0.1", port)), (client, listening.accept()[0]), socket.socketpair(), listening,
    ]  # fmt: skip


def connections_work(group: Group) -> bool:
    remote, *pairs, listening = _kept
    remote.sendall(b"hello")
    works = [remote.recv(5) == b"hello"]
    for one, other in [*pairs, (socket.create_connection(listening.getsockname()), listening.accept()[0])]:
        one.sendall(b"there")
        works.append(other.recv(5) == b"there")
    return all(works)


@pytest.mark.integration
def test_other_connections_of_the_processes_stay() -> None:
    with Workers(3) as workers, socket.create_server(("127.0.0.1", 0)) as server:
        train_again(workers)
        remote = {}
        for name in workers.names:
            workers.ask(name, open_connections, server.getsockname()[1])
            remote[name] = server.accept()[0]
            workers.answer(name)
            workers.ask(name, endless)
        time.sleep(0.05)
        os.kill(workers.pid("w1"), signal.SIGKILL)
        workers.lose("w1")
        lost_soon(workers)
        train_again(workers)
        for name in workers.names:
            workers.ask(name, connections_work)
            remote[name].sendall(remote[name].recv(5))
            assert workers.answer(name)


def resources(group: Group) -> tuple[int, int]:
    """Return how many open files and threads this process has."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def settled(workers: Workers) -> dict[str, tuple[int, int]]:
    """Return the resources of the workers, when they have stopped to change."""
    before = None
    for _ in range(50):
        now = workers.all(resources)
        if now == before:
            break
        before = now
        time.sleep(0.1)
    return now


@pytest.mark.integration
def test_files_and_threads_do_not_grow() -> None:
    with Workers(3) as workers:
        for _ in range(2):
            train_again(workers)
        before = settled(workers)
        for i in range(20):
            if i % 5 == 4:  # one is lost in an operation, and another one joins
                for name in workers.names:
                    workers.ask(name, endless)
                lost = workers.names[-1]
                os.kill(workers.pid(lost), signal.SIGKILL)
                workers.lose(lost)
                lost_soon(workers)
                workers.join()
            train_again(workers)
        after = settled(workers)
        for name in ("w0", "w1"):
            assert after[name] == before[name]


# ---- a device whose operations hang, as NCCL's do


@pytest.mark.integration
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_operations_that_hang_end_without_a_result_when_a_worker_is_declared_dead(
    how: signal.Signals,
) -> None:
    with Workers(2, hanging=True) as workers:
        for operation in ("all_reduce", "broadcast", "all_gather", "gather", "start", "barrier"):
            lost = workers.join()
            train_again(workers)
            os.kill(workers.pid(lost), how)
            workers.names.remove(lost)
            for name in workers.names:
                workers.ask(name, operate, operation)
            if operation == "gather":
                assert workers.answer("w1") is None  # it has sent its part, and needs nothing
                workers.ask("w1", operate, "barrier")
            time.sleep(0.1)
            assert not any(workers.answered(name) for name in workers.names)
            workers.roster.remove(lost)
            lost_soon(workers)
        train_again(workers)


# ---- one worker, with a rendezvous that is told what to do


class ScriptedRendezvous:
    """Announces generations of this worker alone."""

    def __init__(self) -> None:
        self.number = 0
        self.then: Callable[[], None] = lambda: None

    def check_in(self, member: str, address: Address, leaving: bool) -> Generation | None:
        self.then()
        self.number += 1
        return Generation(self.number, (member,), (address,))


def test_late_news_of_a_lost_worker_do_not_disturb_the_next_generation() -> None:
    """The roster hears of a loss first: then others may connect to this worker before it does, or returns from check_in."""
    rendezvous = ScriptedRendezvous()
    group = Group(rendezvous=rendezvous, member="a")
    assert group.rebuild()
    group.generation = Generation(1, ("a", "b"), (group.address, Address(("127.0.0.1", 1), ("127.0.0.1", 2))))
    connections: list[socket.socket] = []

    def another_connects_then_news_come() -> None:
        connections.append(socket.create_connection(group.gloo.endpoint, timeout=0.1))
        time.sleep(0.05)  # gloo accepts it
        group.interrupt("b")

    rendezvous.then = another_connects_then_news_come
    assert group.rebuild()
    group.interrupt("b")
    group.check()
    with connections[0] as connection, pytest.raises(TimeoutError):
        connection.recv(1)  # it is still open
    group.close()
