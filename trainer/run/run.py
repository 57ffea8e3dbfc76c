"""A run and its folder: its identity, its config, and the history of its attempts.

RUN/config.yaml          the config, including the number of lanes and the block size
RUN/run.json             run id, dataset, steps per epoch, the step at which each attempt began, and software versions
RUN/failed.json          why the newest attempt stopped, if the user has to fix something
RUN/lease.json           the process that owns the run, see trainer.run.lease
RUN/events.jsonl         starts and failures of workers, see trainer.run.events
RUN/classes.json         names of the classes, in the order of the logits; not in pre-training
RUN/labels.json          what labels are, if not one class per image, see trainer.labels.labels
RUN/bad-samples.json     see trainer.run.bad_samples
RUN/metrics.jsonl        a row for each step (on object stores: RUN/metrics/), see trainer.run.metrics
RUN/checkpoints/step-…/  see trainer.run.checkpoint
RUN/tensorboard/         TensorBoard event files
RUN/pictures/            reconstructions during pre-training
RUN/evaluations/         results of `maestream evaluate` and `maestream knn`
"""

import json
import platform
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import yaml

from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from pipeline.loading.disk_cache import CHUNK_BYTES
from pipeline.loading.order import Order, default_block, default_lanes
from pipeline.loading.weighted import Weight
from pipeline.storage.store import TEMPORARY, Store, open_store
from pipeline.text import plural
from pipeline.views.prefix import find_prefix
from trainer.config.recipe import CONFIG_TYPES, ConfigT, differences, dump_config, parse_config
from trainer.config.schema import InitConfig, LabelledRunConfig, RunConfig
from trainer.labels.labels import KIND_NAMES, LABELS, NOUNS, measure_labels, read_labels, write_labels
from trainer.phases import Phase, total_steps
from trainer.run.worker import Worker

CONFIG = "config.yaml"
RUN = "run.json"
FAILED = "failed.json"
LEASE = "lease.json"
CLASSES = "classes.json"
RESULTS = ("metrics", "checkpoints/")  # names of files that exist once a run has trained
PACKAGES = ("maestream", "torch", "ray", "nvidia-dali-cuda120")  # packages whose versions are recorded


@dataclass(frozen=True)
class Run:
    """One attempt at a run: its folder and identity. Where it trains and whom it informs: `trainer.run.worker`."""

    store: Store  # the run folder
    run_id: str
    attempt: int  # counted from 1; each start of the workers is a new attempt
    owner: str = ""  # the lease's owner, see `trainer.run.lease`; "": the run folder needs no owner


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json."""

    run_id: str
    fingerprint: str  # the dataset's
    starts: list[int]  # the step at which each attempt began, oldest attempt first
    # Versions of Python and PACKAGES, by the first attempt that had them.
    versions: dict[int, dict[str, str]] = field(default_factory=dict)
    steps_per_epoch: int | None = None  # None in runs of older versions
    data: dict[str, Any] = field(default_factory=dict)  # the dataset's name, samples and number of classes
    # If the dataset has grown: which epochs train on which state of it.
    phases: list[Phase] = field(default_factory=list)

    @property
    def newest_fingerprint(self) -> str:
        """The fingerprint of the dataset that the newest attempt trains on."""
        return self.phases[-1].fingerprint if self.phases else self.fingerprint

    @property
    def fingerprints(self) -> set[str]:
        """The fingerprints of all states of the dataset."""
        return {self.fingerprint, *(phase.fingerprint for phase in self.phases)}

    def epochs_done(self, step: int) -> float | None:
        """The epochs that a run has done after `step` steps. None if unknown, in runs of older versions."""
        if begun := [phase for phase in self.phases if phase.first_step <= step]:
            return (step + begun[-1].shift) / begun[-1].steps_per_epoch
        return step / self.steps_per_epoch if self.steps_per_epoch else None

    def total_steps(self, epochs: float) -> int | None:
        """Steps of a run of so many epochs. None if they are unknown, in runs of older versions."""
        if self.phases:
            return total_steps(self.phases, epochs)
        return None if self.steps_per_epoch is None else max(1, round(epochs * self.steps_per_epoch))


def fix_order(config: ConfigT, dataset: Dataset) -> ConfigT:
    """Return the config with defaults of lanes (V) and block (K) resolved. UserError if they do not fit the dataset."""
    lanes = config.data.lanes or default_lanes(config.global_batch)
    memory = int(config.data.memory_gb * 2**30)
    block = config.data.block or default_block(lanes, dataset.mean_read_bytes, CHUNK_BYTES, memory)
    fixed = config.model_copy(
        update={"data": config.data.model_copy(update={"lanes": lanes, "block": block})}
    )
    make_order(fixed, dataset).lanes_of(0, config.workers.max)
    return fixed


def make_order(config: RunConfig, dataset: Dataset) -> Order:
    """Make the order of samples from a config that `fix_order` returned."""
    assert config.data.lanes is not None
    assert config.data.block is not None
    weights = (
        tuple(Weight(part.shards, part.times) for part in dataset.parts) if dataset.manifest.weighted else ()
    )
    return Order(
        dataset.shard_samples, config.seed, config.global_batch, config.data.lanes, config.data.block, weights
    )


def open_run(url: str, config: ConfigT, dataset: Dataset) -> tuple[ConfigT, Run]:
    """Open a run folder: a new run, or the next attempt of an existing one. Writes nothing; `create_run` does.

    Returns the config, with the values that were fixed when the run first started, and the run. A run that failed before
    its first step, for example because of its config, may start again with another config, as a new run.
    UserError if the folder belongs to another dataset or config, or is not a run folder.
    """
    store = open_store(url)
    try:
        record = read_record(store)
    except FileNotFoundError:
        return _new_run(store, config, dataset)
    newest = record.newest_fingerprint
    extended = newest != dataset.fingerprint and find_prefix(dataset, newest) is not None
    if extended and not config.data.grow:
        raise UserError(
            f"{dataset.store.url} was extended to {plural(dataset.samples, 'sample')} since {store.url} began: add data.grow=true to "
            "train on all of them from the next epoch on, or choose another --out"
        )
    if newest != dataset.fingerprint and not extended:
        raise UserError(
            f"{store.url} was started with another dataset (fingerprint {newest[:12]}; "
            f"{dataset.store.url} has {dataset.fingerprint[:12]}): use that dataset, or another --out"
        )
    before = read_config(store)
    fixed = _with_fixed_values(config, before)
    if type(before) is not type(fixed):
        raise UserError(f"{store.url} is a run of `maestream {before.task}`: choose another --out")
    if changed := differences(before, fixed):
        if _failed_before_training(store, record):
            return fix_order(config, dataset), _first_attempt(store)
        raise UserError(
            f"{store.url} was started with another config ({'; '.join(changed)}): "
            "these cannot change during a run, so use the old values, or another --out"
        )
    make_order(fixed, dataset).lanes_of(0, fixed.workers.max)
    return fixed, Run(store, record.run_id, len(record.starts) + 1)


def _with_fixed_values(config: ConfigT, before: RunConfig) -> ConfigT:
    """Return the config with values from the run's first start, where it does not give its own."""
    fixed = ("lanes", "block", "normalise")
    data = {name: getattr(config.data, name) or getattr(before.data, name) for name in fixed}
    pixels: dict[str, Any] = {name: getattr(before.model, name) for name in ("pixel_dtype", "pixel_bits")}
    if config.model.pixel_mean is None:
        pixels |= {name: getattr(before.model, name) for name in ("pixel_mean", "pixel_std")}
    update: dict[str, Any] = {
        "data": config.data.model_copy(update=data),
        "model": config.model.model_copy(update=pixels),
    }
    init, old = (getattr(c, "init", None) for c in (config, before))
    if isinstance(init, InitConfig) and isinstance(old, InitConfig) and init.step is None:
        update["init"] = init.model_copy(update={"step": old.step})
    return config.model_copy(update=update)


def _new_run(store: Store, config: ConfigT, dataset: Dataset) -> tuple[ConfigT, Run]:
    ours = (
        CONFIG,
        CLASSES,
        LABELS,
        TEMPORARY,
        LEASE,
        FAILED,
    )  # an interrupted first start may have left these
    if names := [name for name in store.names() if not name.startswith(ours)]:
        raise UserError(f"{store.url} is not empty and not a run ({names[0]}, …): choose another --out")
    return fix_order(config, dataset), _first_attempt(store)


def _first_attempt(store: Store) -> Run:
    return Run(store, uuid.uuid4().hex, attempt=1)


def _failed_before_training(store: Store, record: RunRecord) -> bool:
    """Return whether a run stopped with an error for the user, and has no results.

    Results are metrics, a checkpoint, or an attempt that resumed from a snapshot. A run in a bucket that was killed before
    its first checkpoint has none of them in its folder, but perhaps snapshots in memory: without an error it keeps its config.
    """
    names = store.names()
    return FAILED in names and not any(record.starts) and not any(name.startswith(RESULTS) for name in names)


def read_record(store: Store) -> RunRecord:
    """Read run.json. FileNotFoundError if there is none."""
    try:
        tree = json.loads(store.read(RUN))
        steps = tree.get("steps_per_epoch")  # runs of older versions do not have it, nor versions and data
        return RunRecord(
            run_id=str(tree["run_id"]),
            fingerprint=str(tree["fingerprint"]),
            starts=[int(start) for start in tree["starts"]],
            versions={int(attempt): dict(found) for attempt, found in tree.get("versions", {}).items()},
            steps_per_epoch=None if steps is None else int(steps),
            data=dict(tree.get("data", {})),
            phases=[Phase(**phase) for phase in tree.get("phases", [])],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{store.describe(RUN)} is damaged ({error}): choose another --out") from None


def read_started_record(store: Store) -> RunRecord:
    """Read run.json. UserError if there is none."""
    try:
        return read_record(store)
    except FileNotFoundError:
        raise UserError(
            f"{store.url} is a run that has not started: run its training command again"
        ) from None


def _write_record(store: Store, record: RunRecord) -> None:
    store.write(RUN, (json.dumps(asdict(record)) + "\n").encode())


def _versions() -> dict[str, str]:
    """Return the versions of Python and PACKAGES in this process."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def create_run(config: RunConfig, run: Run, dataset: Dataset) -> None:
    """Write config, classes and run.json of a run that `open_run` returned, if it is new."""
    if run.attempt == 1:
        labels = measure_labels(dataset) if isinstance(config, LabelledRunConfig) else None
        run.store.write(CONFIG, dump_config(config).encode())
        if labels:
            run.store.write(CLASSES, (json.dumps(dataset.manifest.classes) + "\n").encode())
            write_labels(run.store, labels)
        steps = make_order(config, dataset).steps_per_epoch
        name = dataset.store.url.rpartition("/")[2]  # without its location: model cards publish this
        data = {"name": name, "samples": dataset.samples, "classes": len(dataset.manifest.classes)}
        _write_record(
            run.store, RunRecord(run.run_id, dataset.fingerprint, [], steps_per_epoch=steps, data=data)
        )


def begin_attempt(
    run: Run, worker: Worker, start: int, change: Callable[[RunRecord], RunRecord] = lambda record: record
) -> Run:
    """Record the next attempt of a run, which begins at step `start`; older attempts may not commit any more.

    Call it on every rank. `change`: what else changes in the record.
    """
    attempt = torch.tensor(0)
    if worker.rank == 0:
        check_owner(run.store, run.owner)
        record, now = change(read_record(run.store)), _versions()
        starts, before = [*record.starts, start], list(record.versions.values())
        versions = record.versions if before[-1:] == [now] else {**record.versions, len(starts): now}
        _write_record(run.store, replace(record, starts=starts, versions=versions))
        attempt += len(starts)
    worker.group.broadcast(attempt, source=0)
    return replace(run, attempt=int(attempt))


def check_owner(store: Store, owner: str) -> None:
    """Raise UserError if another process owns the run folder now. With owner "" nothing is checked."""
    if not owner:
        return
    try:
        current = json.loads(store.read(LEASE)).get("owner")
    except (FileNotFoundError, ValueError, AttributeError):
        current = None
    if current != owner:
        raise UserError(f"another process has taken over {store.url}")


def check_newest(run: Run) -> None:
    """Raise UserError if a newer attempt has begun or another process owns the run: this attempt must not write any more."""
    check_owner(run.store, run.owner)
    newest = len(read_starts(run.store))
    if newest != run.attempt:
        raise UserError(f"attempt {newest} of {run.store.url} has taken over from attempt {run.attempt}")


def read_starts(store: Store) -> list[int]:
    """Return the step at which each attempt began, oldest attempt first."""
    return read_record(store).starts


def in_history(starts: Sequence[int], attempt: int, step: int) -> bool:
    """Whether the newest attempt's weights include the update of step `step` (counted from 0) of attempt `attempt` (from 1).

    They do if every later attempt began after that step (docs/architecture.md, promise 3).
    """
    return attempt <= len(starts) and all(start > step for start in starts[attempt:])


def check_trained_labels(store: Store, dataset: Dataset) -> None:
    """Raise UserError if a dataset has another kind of labels than a run was trained on, other classes, or another order."""
    try:
        trained, asked = json.loads(store.read(CLASSES)), dataset.manifest.classes
    except FileNotFoundError:
        raise UserError(
            f"{store.url} is a pre-training run, which has no classes: fine-tune or probe it, or use `maestream knn`"
        ) from None
    labels = read_labels(store)
    kinds = dataset.manifest.labels, labels.kind if labels else "class"
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{dataset.store.url} has another kind of labels ({KIND_NAMES[kinds[0]]}) than {store.url} was trained on "
            f"({KIND_NAMES[kinds[1]]})"
        )
    if asked != trained:
        first = next(((a, b) for a, b in zip(asked, trained, strict=False) if a != b), None)
        where = f": {first[0]} instead of {first[1]}" if first else ""
        raise UserError(
            f"{dataset.store.url} has other {NOUNS[kinds[0]]} ({len(asked)}) than {store.url} was trained on ({len(trained)}){where}"
        )


def write_failure(run: Run, reason: str) -> None:
    """Record why the run stopped, for `pop_failure`."""
    text = json.dumps({"attempt": run.attempt, "reason": reason}, indent=1)
    run.store.write(FAILED, (text + "\n").encode())


def pop_failure(store: Store) -> str | None:
    """Return why the run stopped the last time and remove the record; None if there is none."""
    try:
        reason = str(json.loads(store.read(FAILED))["reason"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    store.remove([FAILED])
    return reason


def read_config(store: Store) -> RunConfig:
    """Read the config of a run. UserError if the folder is not a run, or the config is damaged."""
    try:
        tree = yaml.safe_load(store.read(CONFIG))
    except FileNotFoundError:
        raise UserError(f"{store.url} is not a run: it has no {CONFIG}") from None
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())  # YAML errors have several lines
        raise UserError(f"{store.describe(CONFIG)} cannot be read ({what})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{store.describe(CONFIG)} is damaged: expected keys and values")
    task = str(tree.get("task", "pretrain"))
    if task not in CONFIG_TYPES:
        expected = "pretrain, finetune or linprobe"
        raise UserError(f"{store.describe(CONFIG)}: unknown task {task}; expected {expected}")
    return parse_config(CONFIG_TYPES[task], tree, store.describe(CONFIG))
