"""What commands print with, and write to."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False, soft_wrap=True, markup=False)  # file names are not markup


def progress_bar() -> Progress:
    """A bar where there is a terminal, nothing elsewhere."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def write_file(path: str, data: bytes) -> None:
    """Write a file in a folder or a bucket."""
    from pipeline.storage import open_store

    folder, _, name = open_store(path).url.rpartition("/")
    open_store(folder or "/").write(name, data)
