"""What a run folder says, for a report: whatever of it is there, and no more of it than a page can hold."""

import base64
import io
import json
import math
import re
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.storage import Store
from trainer.bad_samples import BAD_SAMPLES
from trainer.checkpoint import committed_steps
from trainer.config import RunConfig
from trainer.events import read_events
from trainer.laps import PARTS
from trainer.metrics import history
from trainer.run import CONFIG, FAILED, LEASE, Known, read_begun, read_config

JUDGED = ("val_top1", "val_top5", "val_loss", "val_bad", "knn_step", "knn_top1")
NUMBERS = (
    *("step", "attempt", "epoch", "loss", "lr", "img_per_s", "data_wait_s", "step_s", "world_size"),
    *(*JUDGED, *(f"time/{part}" for part in PARTS)),
)
BINS = 1000  # points of a curve, at most
PICTURES = 6  # at most, and of so many pixels across
PICTURE_WIDTH, QUALITY = 1100, 80
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Picture:
    """A JPEG of what the model reconstructed after `step` steps."""

    step: int
    base64: str


@dataclass(frozen=True)
class Found:
    """What a run folder says. What it lacks is empty, or None."""

    store: Store
    config: RunConfig
    config_text: str  # as it lies there
    known: Known
    metrics: dict[str, Floats]  # by NUMBERS: of each step of the history, NaN where a row says nothing
    events: list[dict[str, Any]]  # but evaluations; each with "at", the steps that were done then
    bad_samples: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    pictures: list[Picture]
    committed: list[int]
    failure: str | None  # what stopped it for good
    owner: dict[str, Any] | None
    damaged: list[str]  # names of files that cannot be read, and are left out

    @property
    def steps(self) -> int:
        """How many the history has."""
        return int(self.metrics["step"][-1]) + 1 if len(self.metrics["step"]) else 0

    @property
    def total_steps(self) -> int | None:
        """How many it will have. None if nobody knows: runs that began when run.json did not have it, and are in their first
        epoch."""
        per_epoch: float | None = self.known.steps_per_epoch
        if per_epoch is None:
            later = np.flatnonzero(self.metrics["epoch"] >= 1)
            if not len(later):
                return None
            per_epoch = self.metrics["step"][later[0]] / self.metrics["epoch"][later[0]]
        return max(1, round(self.config.epochs * per_epoch))


def look(store: Store) -> Found:
    """All that a report tells of a run. UserError where the folder is none."""
    config = read_config(store)
    known = read_begun(store)
    damaged: list[str] = []

    def read(name: str, kind: type) -> Any:
        """JSON of a kind; an empty one of it if there is none."""
        try:
            found = json.loads(store.read(name))
        except FileNotFoundError:
            return kind()
        except ValueError:
            found = None
        if not isinstance(found, kind):
            damaged.append(name)
            return kind()
        return found

    metrics = _metrics(store)
    failure, owner = read(FAILED, dict), read(LEASE, dict)
    evaluations = [read(name, dict) for name in store.names("evaluations")]
    done = int(metrics["step"][-1]) + 1 if len(metrics["step"]) else 0
    return Found(
        store=store,
        config=config,
        config_text=store.read(CONFIG).decode(),
        known=known,
        metrics=metrics,
        events=_placed(read_events(store), done),
        bad_samples=[row for row in read(BAD_SAMPLES, list) if isinstance(row, dict)],
        evaluations=[found for found in evaluations if found],
        pictures=_pictures(store, damaged),
        committed=committed_steps(store),
        failure=str(failure["reason"]) if "reason" in failure else None,
        owner=owner or None,
        damaged=damaged,
    )


def _metrics(store: Store) -> dict[str, Floats]:
    """Metrics as columns: rows of a long run would take gigabytes, and with a ledger far more."""
    numbers = array("d")
    for row in history(store):
        told = row | {f"time/{part}": share for part, share in row.get("time", {}).items()}
        numbers.extend(float(told.get(name, math.nan)) for name in NUMBERS)
    table = np.array(numbers).reshape(-1, len(NUMBERS))[::-1]
    table = table[np.unique(table[:, 0], return_index=True)[1]]  # the last row of each step, in order
    return dict(zip(NUMBERS, table.T, strict=True))


def _placed(events: list[dict[str, Any]], done: int) -> list[dict[str, Any]]:
    """Events with the steps that were done when they happened: who failed did not count, but who came after knew."""
    placed: list[dict[str, Any]] = []
    at = done
    for event in reversed(events):
        if event["event"] != "evaluated":  # metrics have them
            placed.append({**event, "at": event.get("step", at)})
        if event["event"] == "attempt":
            at = event["step"] + event.get("redone", 0)
    return placed[::-1]


def _pictures(store: Store, damaged: list[str]) -> list[Picture]:
    """The first, the last, and some between, spread evenly."""
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
    """Means, and what they lie between: of up to BINS parts of what was measured."""

    x: Floats
    low: Floats
    mean: Floats
    high: Floats


def curve(x: Floats, y: Floats) -> Curve:
    """A curve of as many points as can be seen, in which no spike is lost. NaN are left out."""
    there = np.isfinite(y)
    x, y = x[there], y[there]
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


def time_spent(found: Found) -> dict[str, float]:
    """Seconds of each of trainer.laps.PARTS over all steps, of what older runs do not tell ("untold"), and between
    attempts ("restarts")."""
    metrics = found.metrics
    seconds, told = metrics["step_s"], np.isfinite(metrics["time/step"])
    spent = {part: float(np.nansum(metrics[f"time/{part}"] * seconds)) for part in PARTS}
    waited = float(np.nansum(metrics["data_wait_s"][~told]))
    spent["data_wait"] += waited
    spent["untold"] = float(np.nansum(seconds[~told])) - waited
    spent["restarts"] = float(sum(event.get("gap_s", 0.0) for event in found.events))
    return spent


def world_over_time(found: Found) -> list[tuple[float, int]]:
    """When the number of workers that train changed (seconds since 1970), and to what. Ends with the last moment that is
    known of. Empty where nobody told."""
    attempts = [event for event in found.events if event["event"] == "attempt"]
    if not attempts:
        return []
    changes = [
        (event["time"], event["world_size"] if event["event"] == "attempt" else 0)
        for event in found.events
        if event["event"] in ("attempt", "failure", "leaving")
    ]
    steps_s = found.metrics["step_s"][found.metrics["attempt"] == attempts[-1]["attempt"]]
    end = attempts[-1]["time"] + float(np.nansum(steps_s[1:]))  # it is told with its first step
    return [*changes, (max(end, found.events[-1]["time"]), changes[-1][1])]


def judgements(found: Found) -> dict[str, dict[str, Floats]]:
    """What was measured in training, on "val" and of its neighbours ("knn"), and after how many steps."""
    metrics = found.metrics
    val, knn = (np.isfinite(metrics[name]) for name in ("val_top1", "knn_top1"))
    return {
        "val": {"step": metrics["step"][val] + 1}
        | {name: metrics[f"val_{name}"][val] for name in ("top1", "top5", "loss", "bad")},
        "knn": {"step": metrics["knn_step"][knn], "top1": metrics["knn_top1"][knn]},
    }
