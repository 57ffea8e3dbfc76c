"""Summary of a run folder for a report: everything that it has, limited to what fits on a page."""

import base64
import io
import json
import math
import re
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.arrays import Floats
from pipeline.storage.store import Store
from trainer.config.schema import RunConfig
from trainer.labels.measures import MAIN, MEASURES, found_measures
from trainer.run.bad_samples import BAD_SAMPLES
from trainer.run.checkpoint import committed_steps
from trainer.run.events import read_events
from trainer.run.metrics import history
from trainer.run.run import CONFIG, FAILED, LEASE, RunRecord, read_config, read_started_record
from trainer.run.step_timer import PARTS

EVALUATED = (
    *(f"{prefix}_{name}" for prefix in ("val", "knn") for name in MEASURES),
    *("val_bad", "knn_step"),
)
NUMBERS = (
    *("step", "attempt", "epoch", "loss", "lr", "img_per_s", "data_wait_s", "step_s", "world_size"),
    *(*EVALUATED, *(f"time/{part}" for part in PARTS)),
)
BINS = 1000  # points of a curve, at most
PICTURES = 6  # at most
PICTURE_WIDTH, QUALITY = 1100, 80  # pixels, at most; quality of the JPEG


@dataclass(frozen=True)
class Picture:
    """A JPEG of the model's reconstructions after `step` steps."""

    step: int
    base64: str


@dataclass(frozen=True)
class RunSummary:
    """The content of a run folder. What it does not have is empty or None."""

    store: Store
    config: RunConfig
    config_text: str  # the text of config.yaml
    record: RunRecord
    metrics: dict[str, Floats]  # by NUMBERS, for each step of the history; NaN where a row has no value
    events: list[
        dict[str, Any]
    ]  # without evaluations; each with "at", the number of steps that were done then
    bad_samples: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    pictures: list[Picture]
    committed: list[int]
    failure: str | None  # why it stopped, if the user has to fix something
    owner: dict[str, Any] | None  # the content of lease.json
    damaged: list[str]  # names of files that cannot be read and are left out

    @property
    def steps(self) -> int:
        """Number of steps in the history."""
        return int(self.metrics["step"][-1]) + 1 if len(self.metrics["step"]) else 0

    @property
    def total_steps(self) -> int | None:
        """Number of steps of the finished run. None if it is unknown: in the first epoch of runs of older versions, whose
        run.json does not have it."""
        total = self.record.total_steps(self.config.epochs)
        if total is None:
            later = np.flatnonzero(self.metrics["epoch"] >= 1)
            if not len(later):
                return None
            per_epoch = self.metrics["step"][later[0]] / self.metrics["epoch"][later[0]]
            total = max(1, round(self.config.epochs * per_epoch))
        return total


def summarise(store: Store) -> RunSummary:
    """Read a run folder. UserError if it is not one, or the run has not started."""
    config = read_config(store)
    record = read_started_record(store)
    damaged: list[str] = []

    def read(name: str, expected: type) -> Any:
        """Read JSON of a type; an empty value of that type if the file is missing or damaged."""
        try:
            found = json.loads(store.read(name))
        except FileNotFoundError:
            return expected()
        except ValueError:
            found = None
        if not isinstance(found, expected):
            damaged.append(name)
            return expected()
        return found

    metrics = _metrics(store)
    failure, owner = read(FAILED, dict), read(LEASE, dict)
    evaluations = [read(name, dict) for name in store.names("evaluations")]
    done = int(metrics["step"][-1]) + 1 if len(metrics["step"]) else 0
    return RunSummary(
        store=store,
        config=config,
        config_text=store.read(CONFIG).decode(),
        record=record,
        metrics=metrics,
        events=_with_steps(read_events(store), done),
        bad_samples=[row for row in read(BAD_SAMPLES, list) if isinstance(row, dict)],
        evaluations=[found for found in evaluations if found],
        pictures=_pictures(store, damaged),
        committed=committed_steps(store),
        failure=str(failure["reason"]) if "reason" in failure else None,
        owner=owner or None,
        damaged=damaged,
    )


def _metrics(store: Store) -> dict[str, Floats]:
    """Read metrics as columns. The rows of a long run would take gigabytes, with sample ids far more."""
    numbers = array("d")
    for row in history(store):
        flat = row | {f"time/{part}": share for part, share in row.get("time", {}).items()}
        numbers.extend(float(flat.get(name, math.nan)) for name in NUMBERS)
    table = np.array(numbers).reshape(-1, len(NUMBERS))[::-1]
    table = table[np.unique(table[:, 0], return_index=True)[1]]  # the last row of each step, in order
    return dict(zip(NUMBERS, table.T, strict=True))


def _with_steps(events: list[dict[str, Any]], done: int) -> list[dict[str, Any]]:
    """Add to each event "at", the number of steps that were done then.

    A failure does not record it, but the attempt after it does: the step that it began at, plus the steps that it repeats.
    """
    placed: list[dict[str, Any]] = []
    at = done
    for event in reversed(events):
        if event["event"] != "evaluated":  # metrics have them
            placed.append({**event, "at": event.get("step", at)})
        if event["event"] == "attempt":
            at = event["step"] + event.get("redone", 0)
    return placed[::-1]


def _pictures(store: Store, damaged: list[str]) -> list[Picture]:
    """Read the first picture, the last, and some in between, evenly spaced."""
    matches = [re.fullmatch(r"pictures/step-(\d+)\.png", name) for name in store.names("pictures")]
    names = [match for match in matches if match]
    chosen = np.unique(np.linspace(0, len(names) - 1, min(PICTURES, len(names))).round().astype(int))
    found = []
    for match in (names[i] for i in chosen):
        try:
            found.append(Picture(int(match[1]), _as_jpeg(store.read(match[0]))))
        except (FileNotFoundError, UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
            damaged.append(match[0])
    return found


def _as_jpeg(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
    small.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Curve:
    """Mean, minimum and maximum of a quantity in up to BINS bins."""

    x: Floats
    low: Floats
    mean: Floats
    high: Floats


def curve(x: Floats, y: Floats) -> Curve:
    """Bin values so that they can be drawn without losing a spike. NaN are left out."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) <= BINS:
        return Curve(x, y, y, y)
    first = np.linspace(0, len(y), BINS, endpoint=False).astype(int)
    counts = np.diff([*first, len(y)])
    return Curve(
        np.add.reduceat(x, first) / counts,
        np.minimum.reduceat(y, first),
        np.add.reduceat(y, first) / counts,
        np.maximum.reduceat(y, first),
    )


def time_spent(summary: RunSummary) -> dict[str, float]:
    """Return the seconds of each of trainer.run.step_timer.PARTS over all steps, and of two more: "unmeasured", steps of
    older versions, which do not record the parts; and "restarts", the time between attempts."""
    metrics = summary.metrics
    seconds, attributed = metrics["step_s"], np.isfinite(metrics["time/step"])
    spent = {part: float(np.nansum(metrics[f"time/{part}"] * seconds)) for part in PARTS}
    waited = float(np.nansum(metrics["data_wait_s"][~attributed]))
    spent["data_wait"] += waited
    spent["unmeasured"] = float(np.nansum(seconds[~attributed])) - waited
    spent["restarts"] = float(sum(event.get("gap_s", 0.0) for event in summary.events))
    return spent


def world_over_time(summary: RunSummary) -> list[tuple[float, int]]:
    """Return when the number of training workers changed, in seconds since 1970, and its new value.

    The last entry is the last time at which the run is known to have trained. Empty without events.
    """
    attempts = [event for event in summary.events if event["event"] == "attempt"]
    if not attempts:
        return []
    changes = [
        (event["time"], event["world_size"] if event["event"] == "attempt" else 0)
        for event in summary.events
        # When a worker is lost or leaves in place, the others go on.
        if event["event"] == "attempt"
        or (event["event"] in ("failure", "leaving") and not event.get("in_place"))
    ]
    steps_s = summary.metrics["step_s"][summary.metrics["attempt"] == attempts[-1]["attempt"]]
    # The event of an attempt is sent after its first step.
    end = attempts[-1]["time"] + float(np.nansum(steps_s[1:]))
    return [*changes, (max(end, summary.events[-1]["time"]), changes[-1][1])]


def evaluation_curves(summary: RunSummary) -> dict[str, dict[str, Floats]]:
    """Return the results of evaluations during training, on the validation dataset ("val") and by k-NN ("knn").

    Each has the number of steps that were done ("step"), those of `trainer.labels.measures.MEASURES` that were measured, and for
    "val" the number of bad samples ("bad").
    """
    metrics = {name: column for name, column in summary.metrics.items() if np.isfinite(column).any()}
    curves = {}
    for prefix in ("val", "knn"):
        found = found_measures(metrics, prefix)
        main = next((name for name in MAIN if name in found), None)
        rows = np.isfinite(metrics[f"{prefix}_{main}"]) if main else np.zeros(0, bool)
        columns = summary.metrics if main else {}
        steps = columns.get("knn_step" if prefix == "knn" else "step", np.zeros(0))[rows]
        curves[prefix] = {"step": steps + (prefix == "val")}
        curves[prefix] |= {name: columns[f"{prefix}_{name}"][rows] for name in found if main}
        if prefix == "val" and main:
            curves[prefix]["bad"] = columns["val_bad"][rows]
    return curves


def main_measure(columns: dict[str, Floats]) -> str | None:
    """Return the measure by which models are compared, of one of `evaluation_curves`; None if there is no evaluation."""
    return next((name for name in MAIN if name in columns), None)
