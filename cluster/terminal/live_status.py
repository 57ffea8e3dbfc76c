"""The progress of a run in the terminal: one line that is updated, or a line every few seconds where output goes to a file."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from cluster.terminal.messages import event_line, progress_line
from pipeline.errors import UserError

POLL_S = 0.5
LINE_EVERY_S = 5.0  # between progress lines without a terminal


@contextmanager
def live_status(
    mailbox: Any, console: Console, store_event: Callable[[dict[str, Any]], None]
) -> Iterator[None]:
    """Show the progress, warnings and events that arrive in a mailbox, in a thread that runs until the block ends.

    Args:
        mailbox: handle of the actor `cluster.elastic.mailbox.Mailbox`.
        store_event: called with each event, to keep it in the run folder. If it fails, that is shown as a warning.
    """
    stop = threading.Event()
    thread = threading.Thread(
        target=_show, args=(mailbox, console, store_event, stop), name="console", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _show(
    mailbox: Any, console: Console, store_event: Callable[[dict[str, Any]], None], stop: threading.Event
) -> None:
    columns = (
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting workers", total=None)
        shown_step, shown_at = -1, 0.0
        ending, pending = False, None
        while not ending:
            ending = stop.wait(POLL_S)
            pending = pending or mailbox.take.remote()
            try:
                row, warnings, events = ray.get(pending, timeout=5)
                pending = None
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:
                return  # the cluster is shutting down; the driver reports why
            for text in warnings:
                console.print(f"warning: {text}", style="yellow")
            for event in events:
                console.print(event_line(event))
                try:
                    store_event(event)
                except (UserError, OSError) as error:
                    console.print(
                        f"warning: this event could not be written to the run folder ({error})",
                        style="yellow",
                    )
            if row is None or row["step"] == shown_step:
                continue
            done, total = row["step"] + 1, row["total_steps"]
            progress.update(task, completed=done, total=total, description=progress_line(row))
            if not console.is_terminal and (ending or time.monotonic() - shown_at > LINE_EVERY_S):
                console.print(progress_line(row))
                shown_step, shown_at = row["step"], time.monotonic()
