"""What commands print with, and write to."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

LINE_EACH_S = 60
console = Console(highlight=False, soft_wrap=True, markup=False)  # file names are not markup


def progress_bar() -> Progress:
    """A bar where there is a terminal, nothing elsewhere."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar where there is a terminal, a line a minute elsewhere. Gives what is told how many more are done."""
    done, printed = 0, time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task(what, total=total)

        def more(count: int) -> None:
            nonlocal done, printed
            done += count
            bar.advance(task, count)
            if not console.is_terminal and time.monotonic() - printed > LINE_EACH_S:
                printed = time.monotonic()
                console.print(f"{what}: {done:,} of {total:,}")

        yield more


class BuildProgress:
    """A bar of images with their rates where there is a terminal, a line a minute elsewhere."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("images", total=None, said="looking for images")
        self.images = self.bytes = self.bad = self.kept = 0
        self.begin = self.printed = time.monotonic()

    def plan(self, images: int) -> None:
        self.bar.update(self.task, total=images, said="")
        self.total, self.begin = images, time.monotonic()

    def add(self, images: int, size: int, bad: int, kept: bool) -> None:
        self.images, self.bad = self.images + images, self.bad + bad
        if kept:  # it took no time
            self.kept += images
        else:
            self.bytes += size
        seconds = max(time.monotonic() - self.begin, 1e-3)
        rate = (self.images - self.kept) / seconds
        said = f"{rate:,.0f} images/s, {self.bytes / seconds / 1e6:,.0f} MB/s, {self.bad} bad"
        self.bar.update(self.task, completed=self.images, said=said)
        if not console.is_terminal and time.monotonic() - self.printed > LINE_EACH_S:
            self.printed = time.monotonic()
            left = (self.total - self.images) / max(rate, 1e-3) / 60
            console.print(f"{self.images:,} of {self.total:,} images, {said}, {left:.0f} minutes left")

    def __enter__(self) -> "BuildProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def write_file(path: str, data: bytes) -> None:
    """Write a file in a folder or a bucket."""
    from pipeline.storage import open_store

    folder, _, name = open_store(path).url.rpartition("/")
    open_store(folder or "/").write(name, data)
