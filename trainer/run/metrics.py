"""A run's metrics: rows of JSON, and TensorBoard events.

In a local folder, rows are appended to RUN/metrics.jsonl. Object stores cannot append, so there each checkpoint writes the
rows since the one before to a new file, RUN/metrics/<attempt>-<step>.jsonl, and TensorBoard's event files likewise.
`read_metrics` reads both.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from pipeline.storage.store import Store
from trainer.labels.measures import MEASURES
from trainer.run.json_lines import append_lines, newest_lines, read_lines, repair_lines
from trainer.run.run import Run, in_history, read_starts

METRICS = "metrics.jsonl"
SCALARS = {
    *("loss", "lr", "img_per_s", "data_wait_s", "step_s", "bad_samples"),
    *(f"{prefix}_{name}" for prefix in ("val", "knn") for name in MEASURES),
    "cache_hit_rate",
}


class Metrics:
    """Writes the metrics of one attempt. Rank 0 only."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.local = run.store.is_local
        self.spool = None if self.local else tempfile.TemporaryDirectory(prefix="maestream-metrics-")
        folder = Path(self.spool.name if self.spool else run.store.root)
        self.rows = folder / METRICS
        repair_lines(self.rows)
        self.events = folder / "tensorboard"
        self.tensorboard = self._open(part=0)

    def _open(self, part: int) -> SummaryWriter:
        suffix = f".attempt-{self.run.attempt:04d}-{part:08d}"
        return SummaryWriter(str(self.events), filename_suffix=suffix, flush_secs=30)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows of metrics, one for each step."""
        append_lines(self.rows, rows)
        for row in rows:
            for name in row.keys() & SCALARS | {name for name in row if name.startswith("loss/")}:
                self.tensorboard.add_scalar(name, row[name], row["step"])
            for part, share in row.get("time", {}).items():  # rows of older versions do not have it
                self.tensorboard.add_scalar(f"time/{part}", share, row["step"])

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Write those rows of a snapshot, in order of their steps, that earlier attempts have not written."""
        if rows:
            written = self.written_since(rows[0]["attempt"], rows[0]["step"])
            self.write([row for row in rows if (row["attempt"], row["step"]) not in written])

    def written_since(self, attempt: int, step: int) -> set[tuple[int, int]]:
        """Return attempt and step of rows in the run folder: at least those that were written after that of `attempt` and `step`
        could have been."""
        return {(row["attempt"], row["step"]) for row in self._rows_since(attempt, step)}

    def _rows_since(self, attempt: int, step: int) -> Iterator[dict[str, Any]]:
        if not self.local:
            # The name of a part ends with the step after its last row.
            names = [
                n for n in self.run.store.names("metrics") if int(Path(n).stem.rpartition("-")[2]) > step
            ]
            yield from (row for name in names for row in read_lines(self.run.store, name))
            return
        for row in newest_lines(self.rows):
            yield row
            if (row["attempt"], row["step"]) <= (attempt, step):
                return

    def commit(self, step: int) -> None:
        """Make all rows durable. Call it before the checkpoint of `step` is committed."""
        if self.local:
            self.tensorboard.flush()
            return
        self.tensorboard.close()
        if self.rows.exists():
            self.run.store.write(f"metrics/{self.run.attempt:04d}-{step:08d}.jsonl", self.rows.read_bytes())
            self.rows.unlink()
        for events in self.events.iterdir():
            self.run.store.write(f"tensorboard/{events.name}", events.read_bytes())
            events.unlink()
        self.tensorboard = self._open(part=step)

    def close(self, step: int) -> None:
        self.commit(step)
        self.tensorboard.close()
        if self.spool:
            self.spool.cleanup()


def history(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the rows of the run's history in the order in which they were written. If a step has two rows, the last counts."""
    names = [METRICS] if store.exists(METRICS) else store.names("metrics")  # neither: no rows yet
    starts = read_starts(store)
    for name in names:
        for row in read_lines(store, name):
            if in_history(starts, row["attempt"], row["step"]):
                yield row


def read_metrics(store: Store) -> list[dict[str, Any]]:
    """Return one row for each step of the run's history, in order of the steps."""
    rows = {row["step"]: row for row in history(store)}
    return [rows[step] for step in sorted(rows)]
