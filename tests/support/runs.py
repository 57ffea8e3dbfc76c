"""Runs under way, and what is done to them."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.storage.store import open_store
from tests.support.processes import processes, wait_until
from trainer.run.metrics import read_metrics


def losses(url: object) -> list[float]:
    return [row["loss"] for row in read_metrics(open_store(str(url)))]


@contextlib.contextmanager
def running(command: tuple[object, ...]) -> Iterator[subprocess.Popen[str]]:
    """A run under way; what is left of it is killed."""
    program = Path(sys.executable).with_name("maestream")
    process = subprocess.Popen(
        [program, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        workers = workers_of()
        process.kill()
        process.communicate()
        wait_until(lambda: not any(map(psutil.pid_exists, workers)))


def wait_for_step(step: int, process: subprocess.Popen[str], out: Path) -> None:
    """Until the metrics reach `step`."""
    wait_until(
        lambda: process.poll() is not None or ((out / "metrics.jsonl").exists() and len(losses(out)) > step)
    )
    assert process.poll() is None, "it ended before it could be killed"


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def kill_a_worker() -> None:
    """Kill the first worker of the run, as soon as there is one."""
    found: list[int] = []
    wait_until(lambda: found.extend(workers_of()) or found)
    kill(found[0])


def workers_of(above: int | None = None) -> list[int]:
    """The processes of the training workers below a process; of these tests without: there is one run at a time, and
    its workers are below its driver, or below a Ray that a fixture has started."""
    return processes("RayTrainWorker", above or os.getpid())
