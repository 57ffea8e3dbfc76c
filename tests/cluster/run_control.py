"""Runs under way, and what is done to them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from processes import processes

from pipeline.storage import open_store
from trainer.metrics import read_metrics


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
        workers = workers_of(process.pid)
        process.kill()
        process.communicate()
        wait_until(lambda: not any(map(psutil.pid_exists, workers)))


def wait_until(true: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.02)


def wait_for_step(step: int, process: subprocess.Popen[str], out: Path) -> None:
    """Until the metrics reach `step`."""
    wait_until(
        lambda: process.poll() is not None or ((out / "metrics.jsonl").exists() and len(losses(out)) > step)
    )
    assert process.poll() is None, "it ended before it could be killed"


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def workers_of(driver: int) -> list[int]:
    """The processes of the training workers below a process."""
    return processes("RayTrainWorker", driver)
