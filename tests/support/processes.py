"""What runs below what, and waiting for it."""

import time
from collections.abc import Callable, Iterator

import psutil


def processes(words: str, ancestor: int | None = None) -> list[int]:
    """Pids of the living processes whose command line has these words: with `ancestor`, that one and all below it."""
    return [process.pid for process in _among(ancestor) if words in command_line(process)]


def _among(ancestor: int | None) -> Iterator[psutil.Process]:
    if ancestor is None:
        yield from psutil.process_iter()
        return
    try:
        above = psutil.Process(ancestor)
        yield above
        yield from above.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def command_line(process: psutil.Process) -> str:
    """Empty if it has ended. Ray's workers rewrite theirs with each call, and it may look empty meanwhile: so it is read again."""
    try:
        return next((line for _ in range(5) if (line := " ".join(process.cmdline()))), "")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def wait_until(true: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.02)
