"""What runs below what."""

from collections.abc import Iterator

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
    """Empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
