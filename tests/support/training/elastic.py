"""Workers of a group that is rebuilt, without Ray: processes that do what a test asks, and their roster in the test's process.

    with Workers(3) as workers:
        workers.rebuild()
        workers.ask("w1", endless)          # returns at once
        os.kill(workers.pid("w2"), SIGKILL)
        workers.lose("w2")                  # tells the others, as Ray and the controller do in a job
        assert workers.answer("w1") == LOST

What workers are asked is a function of a module, `action(group, *arguments)`. Its result is pickled.
"""

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from typing import Any

import torch

from tests.support.processes import wait_until
from tests.support.training import gloo  # noqa: F401  # the processes are forked from one with its slow imports
from tests.support.training.hanging import HangingBackend
from trainer.group.group import Group
from trainer.group.rendezvous import WorkerLost
from trainer.group.roster import Roster

LOST = "WorkerLost"  # the answer of a worker whose action raised it
ANSWER_S = 20.0  # a worker that does not answer for so long hangs
KEY = b"elastic"


class Connection(BaseManager):
    """To the process that has the roster."""


class Workers:
    """Some workers, named w0, w1, …

    Args:
        hanging: tensors go through `HangingBackend`.
    """

    def __init__(self, count: int, hanging: bool = False, least: int = 1) -> None:
        self.hanging = hanging
        self.roster = Roster()
        self.names = [f"w{i}" for i in range(count)]  # of those that are not lost
        self.started = 0
        self.roster.start(self.names, least)
        self.processes: dict[str, Any] = {}
        self.pipes: dict[str, Any] = {}

    def __enter__(self) -> "Workers":
        Connection.register("roster", callable=lambda: self.roster, exposed=["check_in", "finish", "status"])
        self.server = Connection(("127.0.0.1", 0), KEY).get_server()
        threading.Thread(target=self._serve, daemon=True).start()
        for name in self.names:
            self._start(name)
        return self

    def __exit__(self, *_: object) -> None:
        self.roster.finish()
        for pipe in self.pipes.values():
            pipe.close()
        for process in self.processes.values():
            process.join(0 if process.name not in self.names else 5)
            process.kill()
            process.join()
        self.server.stop_event.set()

    def _serve(self) -> None:
        with contextlib.suppress(SystemExit):  # that is how it ends
            self.server.serve_forever()

    def _start(self, name: str) -> None:
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("forkserver")
        arguments = name, self.server.address, self.hanging, there
        self.processes[name] = context.Process(target=_work, args=arguments, name=name, daemon=True)
        self.processes[name].start()
        there.close()
        self.pipes[name] = here
        self.started += 1

    def join(self) -> str:
        """Start a worker that will join the others. Returns its name."""
        name = f"w{self.started}"
        self._start(name)
        self.names.append(name)
        return name

    def lose(self, name: str) -> None:
        """Declare a worker dead. The others are told so."""
        self.names.remove(name)
        self.roster.remove(name)

    def rebuild(self) -> None:
        """Let all form the next generation, also those that join. Fails if they do not."""
        new = {name for name in self.names if name not in self.roster.members}
        for name in new:
            self.ask(name, rebuild)
        wait_until(lambda: self.roster.status().joining == new, ANSWER_S)
        for name in self.names:
            if name not in new:
                self.ask(name, rebuild)
        [members] = set(self.answers().values())
        assert sorted(members) == sorted(self.names)

    def pid(self, name: str) -> int:
        return int(self.processes[name].pid)

    def ask(self, name: str, action: Callable[..., Any], *arguments: Any) -> None:
        self.pipes[name].send((action, arguments))

    def answered(self, name: str, seconds: float = 0) -> bool:
        """Whether a worker has answered."""
        return bool(self.pipes[name].poll(seconds))

    def answer(self, name: str, seconds: float = ANSWER_S) -> Any:
        """Return the result of an action, or LOST. Fails if there is none for so many seconds."""
        assert self.answered(name, seconds), f"{name} hangs"
        result = self.pipes[name].recv()
        if isinstance(result, Exception):
            raise result
        return result

    def answers(self, seconds: float = ANSWER_S) -> dict[str, Any]:
        """Return the answers of all."""
        return {name: self.answer(name, seconds) for name in self.names}

    def all(self, action: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Let all do an action at the same time. Returns their answers."""
        for name in self.names:
            self.ask(name, action, *arguments)
        return self.answers()

    def right(self, action: Callable[..., Any], *arguments: Any) -> bool:
        """Let all do an action at the same time. Returns whether all answer True."""
        return all(answer is True for answer in self.all(action, *arguments).values())


def _work(name: str, address: Any, hanging: bool, pipe: Any) -> None:
    """Do what the test asks for, until it closes its end of the pipe."""
    torch.set_num_threads(1)
    Connection.register("roster")
    connection = Connection(address, KEY)
    connection.connect()
    roster = connection.roster()
    group = Group(rendezvous=roster, member=name, backend=HangingBackend() if hanging else None)
    threading.Thread(target=_watch, args=(roster, group), daemon=True).start()
    try:
        while True:
            action, arguments = pipe.recv()
            try:
                result = action(group, *arguments)
            except WorkerLost:
                result = LOST
            except Exception as error:
                result = error
            pipe.send(result)
    except (EOFError, OSError):
        group.close()


def _watch(roster: Any, group: Group) -> None:
    """Tell the group of lost workers, as a job's controller does."""
    known: frozenset[str] = frozenset()
    try:
        while True:
            gone = roster.status().removed - {group.member}
            for name in gone - known:
                group.interrupt(name)
            known = gone
            time.sleep(0.02)
    except (EOFError, OSError):
        pass  # the test has ended


# ---- actions


def rebuild(group: Group, leaving: bool = False) -> tuple[str, ...]:
    """Become a member of the next generation. Returns its members, () if this worker is not one."""
    if not group.rebuild(leaving):
        return ()
    assert group.generation is not None
    return group.generation.members


def operations(group: Group) -> bool:
    """Try all operations, and return whether the results are right."""
    rank, size = group.rank, group.size
    total = torch.arange(1000.0) + rank
    group.all_reduce(total)
    largest = torch.tensor([rank, 7])
    group.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    works = [(part, group.start(part)) for part in torch.full((3, 5), rank + 1)]
    for _, work in works:
        group.wait(work)
    right = [
        torch.equal(total, torch.arange(1000.0) * size + sum(range(size))),
        largest.tolist() == [size - 1, 7],
        all((part == sum(range(size + 1))).all() for part, _ in works),
    ]
    for source in range(size):
        sent = torch.full((2, 3), rank, dtype=torch.int64)
        group.broadcast(sent, source)
        right.append(bool((sent == source).all()))
    parts = group.all_gather(torch.tensor([[rank, -rank]]))
    right.append([part.tolist() for part in parts] == [[[r, -r]] for r in range(size)])
    gathered = group.gather(torch.tensor([rank * 0.5]))
    right.append(
        gathered is None if rank else [part.item() for part in gathered] == [r / 2 for r in range(size)]
    )
    group.barrier()
    return all(right)


def operate(group: Group, name: str) -> None:
    """Do one operation, with what the last rank sends."""
    tensor = torch.ones(1 << 18)
    if name == "broadcast":
        group.broadcast(tensor, group.size - 1)
    elif name == "start":
        group.wait(group.start(tensor))
    elif name == "barrier":
        group.barrier()
    else:
        getattr(group, name)(tensor)


def endless(group: Group) -> None:
    """Sum large tensors until a worker is lost."""
    while True:
        tensor = torch.ones(1 << 20)
        group.all_reduce(tensor)
        assert (tensor == group.size).all()
