"""Training goes on in the same processes when workers are lost, join or leave; the result is that of a run without any of it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.storage.store import Store, open_store
from tests.support.processes import wait_until
from tests.support.runs import losses
from tests.support.training.elastic import Workers
from tests.support.training.small_runs import config_of, train, weights
from trainer.group.group import Group
from trainer.group.requests import Request
from trainer.run.metrics import read_metrics
from trainer.run.run import Run, create_run, make_order, open_run, read_starts
from trainer.run.worker import Callbacks, Upcoming, Worker
from trainer.train.pretrain import pretrain

pytestmark = pytest.mark.integration

STEPS = 100
CHANGES: dict[str, Any] = {"epochs": 20.0, "workers": {"min": 1, "max": 4}, "log_every": 3}


def work(group: Group, data: str, out: str, pause_s: float) -> tuple[bool, int]:
    """Train as one worker; a file OUT.<name>.<request> asks for something. Returns what `train` returns, and the process id."""

    def request() -> Request:
        time.sleep(pause_s)
        asked = Path(f"{out}.{group.member}.change")
        if asked.exists():
            asked.unlink()
            return Request.CHANGE
        return Request.LEAVE if Path(f"{out}.{group.member}.leave").exists() else Request.NONE

    def upcoming() -> Upcoming | None:
        """A guess at where this worker will join."""
        members = group.rendezvous.status().members
        if group.member in members:
            return None
        return Upcoming(len(losses(out)) + 1, len(members), len(members) + 1)

    config = config_of(**CHANGES)
    run = Run(open_store(out), Path(out).parent.name, 0)
    callbacks = Callbacks(request=request, upcoming=upcoming)
    done = pretrain(config, open_dataset(data), run, Worker(group, ledger=True), callbacks)
    return done, os.getpid()


class Training:
    """A run of several workers."""

    def __init__(self, workers: Workers, dataset: Dataset, out: Path, pause_s: float = 0.02) -> None:
        self.workers, self.out, self.store = workers, out, open_store(str(out))
        create_run(*open_run(str(out), config_of(**CHANGES), dataset), dataset)
        self.job = (work, dataset.store.url, str(out), pause_s)
        for name in workers.names:
            workers.ask(name, *self.job)

    def wait_for(self, step: int) -> None:
        wait_until(lambda: (self.out / "metrics.jsonl").exists() and len(losses(self.out)) > step, 60)

    def wait_for_workers(self, count: int) -> None:
        """Wait until so many workers train."""
        wait_until(lambda: read_metrics(self.store)[-1]["world_size"] == count, 60)

    def kill(self, name: str) -> None:
        before = len(self.workers.names)
        os.kill(self.workers.pid(name), signal.SIGKILL)
        self.workers.lose(name)
        self.wait_for_workers(before - 1)

    def join(self) -> None:
        """Start a worker, wait until it is ready, ask a member to let it join, and wait until it trains."""
        roster = self.workers.roster
        self.workers.ask(self.workers.join(), *self.job)
        wait_until(lambda: roster.status().joining, 60)
        Path(f"{self.out}.{roster.members[-1]}.change").touch()
        self.wait_for_workers(len(self.workers.names))

    def leave(self, name: str) -> None:
        Path(f"{self.out}.{name}.leave").touch()
        assert self.workers.answer(name)[0]
        self.workers.names.remove(name)
        self.wait_for_workers(len(self.workers.names))

    def finish(self) -> None:
        """Wait for the end, and check that all that are left were there in the same process."""
        for name, (finished, pid) in self.workers.answers(60).items():
            assert finished
            assert pid == self.workers.pid(name)


def check(store: Store, reference: Path, dataset: Dataset, attempts: int) -> None:
    """Losses and weights are those of a run in one process, and each step was done once with its samples."""
    assert losses(store.root) == pytest.approx(losses(reference), rel=1e-9, abs=0)
    ours, theirs = weights(store.root), weights(reference)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-9
    order = make_order(config_of(**CHANGES), dataset)
    lines = (Path(store.root) / "metrics.jsonl").read_text().splitlines()
    rows = read_metrics(store)
    assert len(lines) == len(rows) == STEPS  # no step was done twice
    for row in rows:
        assert sorted(row["sample_ids"]) == sorted(order.step_ids(row["step"], 0, 1).tolist())
    starts = read_starts(store)
    assert len(starts) == attempts
    assert [row["attempt"] for row in rows] == [sum(start <= row["step"] for start in starts) for row in rows]


@pytest.fixture(scope="module")
def reference(scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(scenes, out, **CHANGES | {"workers": 1})
    return out


def test_workers_are_lost_join_and_leave(scenes: Dataset, reference: Path, tmp_path: Path) -> None:
    with Workers(3) as workers:
        training = Training(workers, scenes, tmp_path / "run", pause_s=0.1)
        training.wait_for(5)
        training.kill("w1")
        training.join()
        training.kill(workers.roster.members[0])  # the one that writes
        training.join()
        training.leave(workers.roster.members[0])
        training.finish()
    check(training.store, reference, scenes, attempts=6)


def test_a_worker_that_hangs_is_left_behind(scenes: Dataset, reference: Path, tmp_path: Path) -> None:
    with Workers(3) as workers:
        training = Training(workers, scenes, tmp_path / "run")
        training.wait_for(10)
        os.kill(workers.pid("w2"), signal.SIGSTOP)
        time.sleep(0.5)
        workers.lose("w2")
        training.finish()
    check(training.store, reference, scenes, attempts=2)


def test_a_worker_that_waits_to_join_is_released_at_the_end(
    scenes: Dataset, reference: Path, tmp_path: Path
) -> None:
    with Workers(2) as workers:
        training = Training(workers, scenes, tmp_path / "run", pause_s=0.0)
        training.workers.ask(workers.join(), *training.job)
        training.finish()
    check(training.store, reference, scenes, attempts=1)
