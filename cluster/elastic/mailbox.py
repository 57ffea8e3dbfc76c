"""A Ray actor that passes metrics, warnings and events from the workers to the driver."""

import logging
import time
from typing import Any

from cluster.elastic.prometheus import Gauges

MAX_FAILURES = 3  # a run fails after this many failures in a row without progress in between


class Mailbox:
    """Collects messages from the workers and from Ray's controller until the driver takes them.

    Runs as a Ray actor on the driver's node. It also passes the driver's stop request to the controller.
    """

    def __init__(self, run_id: str) -> None:
        self.gauges = Gauges(run_id)
        self.row: dict[str, Any] | None = None  # the newest metrics
        self.warnings: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.new_attempt: dict[str, Any] | None = None  # an attempt that has not finished its first step
        self.start = -1  # the step at which the newest attempt started
        self.latest_start = -1  # the latest step at which any attempt had started when a worker failed
        self.failures = 0  # failures since an attempt started there
        self.done, self.done_at = 0, 0.0  # steps of the run that are finished, and when the last one was
        self.stopping = False

    def put_metrics(self, row: dict[str, Any]) -> None:
        """Replace the newest metrics with `row`, a row of RUN/metrics.jsonl."""
        self.row = row
        self.gauges.update(row)

    def add_warning(self, text: str) -> None:
        self.warnings.append(text)

    def add_event(self, event: dict[str, Any]) -> None:
        self.events.append({"time": time.time(), **event})

    def begin_attempt(self, attempt: int, step: int, world_size: int) -> None:
        """Record that attempt `attempt` starts at step `step`.

        The event is added after the attempt's first step, when the lost steps and the lost time are known.
        """
        self.new_attempt = {"event": "attempt", "attempt": attempt, "step": step, "world_size": world_size}
        self.start = step

    def count_failure(self, event: dict[str, Any]) -> bool:
        """Count a failure of workers, and add its event. Returns whether the run goes on.

        It does not after MAX_FAILURES without progress: if no attempt since the first of them started at a later step.
        """
        self.failures = 1 if self.start > self.latest_start else self.failures + 1
        self.latest_start = max(self.start, self.latest_start)
        goes_on = self.failures < MAX_FAILURES
        self.add_event({"event": "failure", **event, "again": goes_on})
        return goes_on

    def set_steps_done(self, steps: int) -> None:
        """Record that the newest attempt has finished `steps` steps of the run."""
        now = time.time()
        if self.new_attempt:
            if self.done_at:
                self.new_attempt["redone"] = max(self.done - self.start, 0)
                self.new_attempt["gap_s"] = round(now - self.done_at, 2)
            self.add_event(self.new_attempt)
            self.gauges.count_attempt(self.new_attempt)
            self.new_attempt = None
        self.done, self.done_at = steps, now

    def request_stop(self) -> None:
        """Ask the controller to stop the run."""
        self.stopping = True

    def is_stopping(self) -> bool:
        """Return whether the run should stop."""
        return self.stopping

    def steps_done(self) -> int:
        """Return how many steps of the run the newest attempt has finished."""
        return self.done

    def take(self) -> tuple[dict[str, Any] | None, list[str], list[dict[str, Any]]]:
        """Return the newest metrics, and the warnings and events since the last call."""
        warnings, self.warnings = self.warnings, []
        events, self.events = self.events, []
        return self.row, warnings, events


class MailboxHandler(logging.Handler):
    """Sends a worker's log records to the driver's console."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self.mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        self.mailbox.add_warning.remote(record.getMessage())
