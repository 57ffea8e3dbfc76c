"""Output of the commands: the console, progress bars, and files in a folder or a bucket."""

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

LINE_EVERY_S = 60  # between progress lines without a terminal
console = Console(highlight=False, soft_wrap=True, markup=False)  # brackets in file names are no markup


def progress_bar() -> Progress:
    """Return a progress bar. It shows nothing without a terminal."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


@contextmanager
def progress_counter(noun: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` items are done: a progress bar, or a line per minute without a terminal.

    Yields a function that takes the number of items completed since its last call.
    """
    done, printed = 0, time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task(noun, total=total)

        def advance(count: int) -> None:
            nonlocal done, printed
            done += count
            bar.advance(task, count)
            if not console.is_terminal and time.monotonic() - printed > LINE_EVERY_S:
                printed = time.monotonic()
                console.print(f"{noun}: {done:,} of {total:,}")

        yield advance


class BuildProgress:
    """Progress of a build in images, with rates: a progress bar, or a line per minute without a terminal."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("images", total=None, rates="listing images")
        self.images = self.bytes = self.bad = self.kept = 0
        self.begin = self.printed = time.monotonic()

    def start(self, images: int) -> None:
        """Set the total number of images and start the clock of the rates."""
        self.bar.update(self.task, total=images, rates="")
        self.total, self.begin = images, time.monotonic()

    def add(self, images: int, size: int, bad: int, kept: bool) -> None:
        """Add a shard: its number of images and their bytes, how many of them are bad, and whether it existed before."""
        self.images, self.bad = self.images + images, self.bad + bad
        if kept:  # written by an earlier build: it must not count in the rates
            self.kept += images
        else:
            self.bytes += size
        seconds = max(time.monotonic() - self.begin, 1e-3)
        rate = (self.images - self.kept) / seconds
        rates = f"{rate:,.0f} images/s, {self.bytes / seconds / 1e6:,.0f} MB/s, {self.bad} bad"
        self.bar.update(self.task, completed=self.images, rates=rates)
        if not console.is_terminal and time.monotonic() - self.printed > LINE_EVERY_S:
            self.printed = time.monotonic()
            left = (self.total - self.images) / max(rate, 1e-3) / 60
            console.print(f"{self.images:,} of {self.total:,} images, {rates}, {left:.0f} min left")

    def __enter__(self) -> "BuildProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def write_file(path: str, data: bytes) -> None:
    """Write a file to a path or an s3:// URL."""
    from pipeline.storage.store import open_store

    folder, _, name = open_store(path).url.rpartition("/")
    open_store(folder or "/").write(name, data)
