"""Runs under way, and what is done to them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.storage import open_store
from trainer.metrics import read_metrics


def losses(url: object) -> list[float]:
    return [row["loss"] for row in read_metrics(open_store(str(url)))]


@contextlib.contextmanager
def running(command: tuple[object, ...]) -> Iterator[subprocess.Popen[str]]:
    """A run under way; what is left of it is killed."""
    program = Path(sys.executable).with_name("maestream")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([program, *map(str, command)], **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        workers = workers_of(process.pid)
        process.kill()
        process.communicate()
        wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


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
    """The processes of a driver's training workers."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    workers = []
    for pid in parents:
        above = pid
        while above in parents and above != driver:
            above = parents[above]
        if above == driver:
            with contextlib.suppress(OSError):
                if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    workers.append(pid)
    return workers
