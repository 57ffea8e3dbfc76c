"""What a person sees while workers train elsewhere: one live line, or plain ones without a terminal."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from cluster.gauges import Gauges
from pipeline.errors import UserError

POLL_S = 0.5
PLAIN_LINE_S = 5.0  # seconds between two lines where there is no terminal


class Mailbox:
    """A Ray actor where workers and Ray's controller leave word for the driver: the newest metrics, warnings,
    and events."""

    def __init__(self, run_id: str) -> None:
        self.gauges = Gauges(run_id)
        self.row: dict[str, Any] | None = None
        self.warnings: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.attempt: dict[str, Any] | None = None  # has begun, and done no step yet
        self.began = -1  # the step at which the newest attempt began
        self.reached, self.reached_at = 0, 0.0  # steps that the newest attempt has done, and when it had
        self.stopping = False

    def put(self, row: dict[str, Any]) -> None:
        self.row = row
        self.gauges.see_row(row)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def tell(self, event: dict[str, Any]) -> None:
        self.events.append({"time": time.time(), **event})

    def begin(self, attempt: int, step: int, world_size: int) -> None:
        """Attempt `attempt` begins at step `step`. It is told with its first step: then it is known what it cost."""
        self.attempt = {"event": "attempt", "attempt": attempt, "step": step, "world_size": world_size}
        self.began = step

    def reach(self, steps: int) -> None:
        """So many steps are done."""
        now = time.time()
        if self.attempt:
            if self.reached_at:
                self.attempt["redone"] = max(self.reached - self.began, 0)
                self.attempt["gap_s"] = round(now - self.reached_at, 1)
            self.tell(self.attempt)
            self.gauges.see_attempt(self.attempt)
            self.attempt = None
        self.reached, self.reached_at = steps, now

    def stop(self) -> None:
        """The run is to stop."""
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping

    def steps(self) -> int:
        """How many are done."""
        return self.reached

    def start(self) -> int:
        """The step at which the newest attempt began, -1 if none has."""
        return self.began

    def take(self) -> tuple[dict[str, Any] | None, list[str], list[dict[str, Any]]]:
        warnings, self.warnings = self.warnings, []
        events, self.events = self.events, []
        return self.row, warnings, events


class MailboxHandler(logging.Handler):
    """Sends log records to the driver's console."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self.mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        self.mailbox.warn.remote(record.getMessage())


def summary(row: dict[str, Any]) -> str:
    """One line, what matters most first: a narrow terminal cuts its end off."""
    # The step is what the time should go into; what else takes at least half a per cent of it is told.
    parts = [
        f"{name.replace('_', ' ')} {share:.0%}"
        for name, share in row["time"].items()
        if name == "data_wait" or (name != "step" and share >= 0.005)
    ]
    return (
        f"step {row['step'] + 1}/{row['total_steps']}  loss {row['loss']:.4f}  {row['img_per_s']:,.0f} img/s  "
        f"{', '.join(parts)}  workers {row['world_size']}  lr {row['lr']:.2e}  epoch {row['epoch']}"
    )


def sentence(event: dict[str, Any]) -> str:
    """An event in one line."""
    if event["event"] == "failure":
        ending = "starting the workers again" if event["again"] else "giving up, nothing gets any further"
        return f"{event['cause']}: {ending}"
    if event["event"] == "leaving":
        return f"{event['cause']}: the workers save their work, and leave"
    if event["event"] == "waiting":
        return f"{event['cause']} workers: waiting for more"
    if event["event"] == "micro_batch":
        return f"micro_batch auto: {event['samples']} of a worker's {event['most']} samples at once"
    if event["event"] == "evaluated":
        if "knn_top1" in event:
            return f"step {event['knn_step']}: top-1 of nearest neighbours {event['knn_top1']:.2f} %"
        return (
            f"step {event['step']}: top-1 {event['val_top1']:.2f} %, top-5 {event['val_top5']:.2f} %, loss "
            f"{event['val_loss']:.4f}" + (f", {event['val_bad']:.0f} bad samples" if event["val_bad"] else "")
        )
    text = f"attempt {event['attempt']}: {event['world_size']} workers from step {event['step']}"
    if "redone" in event:
        text += f", {event['redone']} steps redone, {event['gap_s']:g} s without a step"
    return text


@contextmanager
def watch(mailbox: Any, console: Console, keep: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Show what arrives in `mailbox` until the block ends; `keep` gets each event, too."""
    stop = threading.Event()
    thread = threading.Thread(target=_show, args=(mailbox, console, keep, stop), name="console", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _show(
    mailbox: Any, console: Console, keep: Callable[[dict[str, Any]], None], stop: threading.Event
) -> None:
    columns = (
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting workers", total=None)
        shown: tuple[int, float] = (-1, 0.0)
        ending, taken = False, None
        while not ending:
            ending = stop.wait(POLL_S)
            taken = taken or mailbox.take.remote()
            try:
                row, warnings, events = ray.get(taken, timeout=5)
                taken = None
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:
                return  # the cluster is going away; what happened is told by who notices
            for text in warnings:
                console.print(f"warning: {text}", style="yellow")
            for event in events:
                console.print(sentence(event))
                try:
                    keep(event)
                except (UserError, OSError) as error:
                    console.print(f"warning: this event is not kept ({error})", style="yellow")
            if row is None or row["step"] == shown[0]:
                continue
            done, total = row["step"] + 1, row["total_steps"]
            progress.update(task, completed=done, total=total, description=summary(row))
            if not console.is_terminal and (ending or time.monotonic() - shown[1] > PLAIN_LINE_S):
                console.print(summary(row))
                shown = row["step"], time.monotonic()
