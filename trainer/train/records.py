"""What rank 0 writes into the run folder: metrics, checkpoints and pictures."""

import math
import time
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import RunConfig
from trainer.run.checkpoint import Checkpointer, check_finite
from trainer.run.metrics import Metrics
from trainer.run.run import Run
from trainer.train.progress import Progress
from trainer.train.task import Task


@dataclass
class Records:
    """Exists on rank 0 only."""

    task: Task
    config: RunConfig
    metrics: Metrics
    checkpointer: Checkpointer
    saved: int  # steps in the newest checkpoint that was begun
    saved_at: float  # when, as time.perf_counter() tells
    next: int  # step of the first row of metrics that has not been written

    def begin_attempt(self, run: Run) -> None:
        """Go on in a new attempt. A checkpoint that is being written is still committed."""
        self.metrics.run = self.checkpointer.run = run

    def overdue(self) -> bool:
        """Return whether the newest checkpoint is too old."""
        age = time.perf_counter() - self.saved_at
        return age > self.config.checkpoint.every_minutes * 60 and not self.checkpointer.busy

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows of metrics, one for each step, except those that have been written.

        If this worker was behind another and got its progress, the two may have read the losses after different steps.
        """
        new = [row for row in rows if row["step"] >= self.next]
        if new:
            self.metrics.write(new)
            self.next = new[-1]["step"] + 1

    def save(self, step: int) -> None:
        """Begin a checkpoint of the state after `step` steps. UserError if a weight is not finite."""
        self.saved_at = time.perf_counter()
        check_finite(step, self.task.model)
        self.metrics.commit(step)
        self.checkpointer.save(step, self.task.model, self.task.optimizer)
        self.saved = step

    def close(self, step: int) -> None:
        """Wait until everything is written."""
        self.checkpointer.wait()
        self.metrics.close(step)


def open_records(
    task: Task,
    config: RunConfig,
    run: Run,
    fingerprint: str,
    progress: Progress,
    taking_over: bool,
) -> Records:
    """Begin to write, as rank 0.

    Args:
        fingerprint: of the dataset.
        progress: rows of metrics that are missing in the run folder are written.
        taking_over: from a worker that was rank 0 before. The checkpoint that it was writing may be lost, so the next one is due.
    """
    metrics = Metrics(run)
    metrics.restore(progress.unsaved)
    first = progress.step - len(progress.pending)
    if progress.pending:  # a worker that was rank 0 before may have read these losses already
        oldest = progress.pending[0]
        written = metrics.written_since(oldest.attempt, oldest.step)
        first += sum((step.attempt, step.step) in written for step in progress.pending)
    saved_at = -math.inf if taking_over else time.perf_counter()
    return Records(task, config, metrics, Checkpointer(run, config, fingerprint), 0, saved_at, first)
