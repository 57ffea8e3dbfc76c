"""A run and its folder: who it is, what was fixed when it first started, and this worker's place in it.

RUN/config.yaml          the config, with B, V, K as fixed
RUN/run.json             run id, dataset, steps of an epoch, at which step each attempt began, and versions of what computed
RUN/failed.json          what stopped the newest attempt, if that is for a person to mend
RUN/lease.json           whose the run is, see trainer.lease
RUN/events.jsonl         what became of its workers, see trainer.events
RUN/classes.json         of what names classes: their names, in the order of its answers
RUN/bad-samples.json     see trainer.bad_samples
RUN/metrics.jsonl        a row a step (on object stores: RUN/metrics/, see trainer.metrics)
RUN/checkpoints/step-…/  see trainer.checkpoint
RUN/tensorboard/  RUN/pictures/  RUN/evaluations/
"""

import json
import platform
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
import yaml

from pipeline.cache import CHUNK_BYTES
from pipeline.errors import UserError
from pipeline.manifest import Dataset
from pipeline.order import Order, default_block, default_lanes
from pipeline.storage import TEMPORARY, Store, open_store
from trainer.config import InitConfig, LabelledRunConfig, RunConfig
from trainer.laps import Laps
from trainer.recipe import KINDS, C, differences, dump_config, parse_config
from trainer.vote import Wish

CONFIG = "config.yaml"
RUN = "run.json"
FAILED = "failed.json"
LEASE = "lease.json"
CLASSES = "classes.json"
PACKAGES = ("maestream", "torch", "ray", "nvidia-dali-cuda120")  # whose versions are told


@dataclass(frozen=True)
class Run:
    """What a training loop is handed: where to report and checkpoint, and which worker it is."""

    store: Store
    run_id: str
    attempt: int  # 1 for a run's first group of workers, one more for each that comes after
    rank: int = 0
    world_size: int = 1
    node: str = "local"  # which machine it is on
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    owner: str = ""  # who has to own the folder, see trainer.lease; "": nobody need
    ledger: bool = False  # whether metrics name the samples of each step
    laps: Laps = field(default_factory=Laps)  # where the time goes; of rank 0 in metrics
    wish: Callable[[], Wish] = lambda: Wish.GO_ON  # what this worker has been told
    # For the console; rank 0 only.
    on_metrics: Callable[[dict[str, Any]], None] = lambda row: None
    on_begin: Callable[[int, int, int], None] = lambda attempt, step, world_size: None
    on_step: Callable[[int], None] = lambda steps_done: None
    on_event: Callable[[dict[str, Any]], None] = lambda event: None


@dataclass(frozen=True)
class Known:
    """What run.json says."""

    run_id: str
    fingerprint: str
    starts: list[int]  # the step at which each attempt began, the first attempt's first
    versions: dict[int, dict[str, str]] = field(default_factory=dict)  # by the first attempt that had these
    steps_per_epoch: int | None = None  # None: it was not kept when this run began
    data: dict[str, Any] = field(default_factory=dict)  # the dataset's name, samples and number of classes


def fix_order(config: C, dataset: Dataset) -> C:
    """The config with lanes V and block K filled in. UserError where they do not fit the dataset."""
    lanes = config.data.lanes or default_lanes(config.global_batch)
    memory = int(config.data.memory_gb * 2**30)
    block = config.data.block or default_block(lanes, dataset.mean_sample_bytes, CHUNK_BYTES, memory)
    fixed = config.model_copy(
        update={"data": config.data.model_copy(update={"lanes": lanes, "block": block})}
    )
    make_order(fixed, dataset).lanes_of(0, config.workers.max)
    return fixed


def make_order(config: RunConfig, dataset: Dataset) -> Order:
    """The order of a config whose lanes and block are fixed."""
    assert config.data.lanes is not None
    assert config.data.block is not None
    return Order(
        dataset.shard_samples, config.seed, config.global_batch, config.data.lanes, config.data.block
    )


def open_run(url: str, config: C, dataset: Dataset) -> tuple[C, Run]:
    """A run in a new folder, or the next attempt of the one that is there. Writes nothing: `found_run` does.

    Returns the config as fixed when the run first started, and the run (rank 0 of 1).
    UserError where the folder belongs to another dataset or config, or is something else.
    """
    store = open_store(url)
    try:
        known = read_known(store)
    except FileNotFoundError:
        return _new_run(store, config, dataset)
    if known.fingerprint != dataset.fingerprint:
        raise UserError(
            f"{store.url} was started with another dataset (fingerprint {known.fingerprint[:12]}, "
            f"{dataset.store.url} has {dataset.fingerprint[:12]}): give that one, or another --out"
        )
    before = read_config(store)
    fixed = _filled_in(config, before)
    if type(before) is not type(fixed):
        raise UserError(f"{store.url} is a run of `maestream {before.task}`: choose another --out")
    if changed := differences(before, fixed):
        raise UserError(
            f"{store.url} was started with another config ({'; '.join(changed)}): "
            "these are fixed for a run, so give the old values, or another --out"
        )
    make_order(fixed, dataset).lanes_of(0, fixed.workers.max)
    return fixed, Run(store, known.run_id, len(known.starts) + 1)


def _filled_in(config: C, before: RunConfig) -> C:
    """The config with what was fixed when the run first started, where it says nothing else."""
    data = {name: getattr(config.data, name) or getattr(before.data, name) for name in ("lanes", "block")}
    update: dict[str, Any] = {"data": config.data.model_copy(update=data)}
    init, old = (getattr(c, "init", None) for c in (config, before))
    if isinstance(init, InitConfig) and isinstance(old, InitConfig) and init.step is None:
        update["init"] = init.model_copy(update={"step": old.step})
    return config.model_copy(update=update)


def _new_run(store: Store, config: C, dataset: Dataset) -> tuple[C, Run]:
    ours = (CONFIG, CLASSES, TEMPORARY, LEASE, FAILED)  # a start may have been killed here
    if names := [name for name in store.names() if not name.startswith(ours)]:
        raise UserError(f"{store.url} is not empty and not a run ({names[0]}, …): choose another --out")
    return fix_order(config, dataset), Run(store, uuid.uuid4().hex, attempt=1)


def read_known(store: Store) -> Known:
    """What run.json says. FileNotFoundError if it is no run."""
    try:
        known = json.loads(store.read(RUN))
        starts = [int(start) for start in known["starts"]]
        versions = {int(attempt): dict(those) for attempt, those in known.get("versions", {}).items()}
        steps = known.get("steps_per_epoch")
        return Known(
            str(known["run_id"]),
            str(known["fingerprint"]),
            starts,
            versions,
            None if steps is None else int(steps),
            dict(known.get("data", {})),  # runs of an older version lack it
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{store.describe(RUN)} is damaged ({error}): choose another --out") from None


def read_begun(store: Store) -> Known:
    """What run.json says. UserError if it is not there."""
    try:
        return read_known(store)
    except FileNotFoundError:
        raise UserError(f"{store.url} is a run that has not begun: start it again") from None


def _write_known(store: Store, known: Known) -> None:
    store.write(RUN, (json.dumps(asdict(known)) + "\n").encode())


def _versions() -> dict[str, str]:
    """Of what computes here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def found_run(config: RunConfig, run: Run, dataset: Dataset) -> None:
    """Write what `open_run` found into a new run's folder: from now on it is this run's."""
    if run.attempt == 1:
        run.store.write(CONFIG, dump_config(config).encode())
        if isinstance(config, LabelledRunConfig):
            run.store.write(CLASSES, (json.dumps(dataset.manifest.classes) + "\n").encode())
        steps = make_order(config, dataset).steps_per_epoch
        name = dataset.store.url.rpartition("/")[2]  # not where it lies: a model's card tells it to everybody
        data = {"name": name, "samples": dataset.samples, "classes": len(dataset.manifest.classes)}
        _write_known(run.store, Known(run.run_id, dataset.fingerprint, [], steps_per_epoch=steps, data=data))


def begin_attempt(run: Run, start: int) -> Run:
    """The next attempt of a run, from step `start` on: older ones are refused from now on. Call it on every rank."""
    attempt = torch.tensor(0, device=run.device)
    if run.rank == 0:
        check_owner(run)
        known, now = read_known(run.store), _versions()
        starts, before = [*known.starts, start], list(known.versions.values())
        versions = known.versions if before[-1:] == [now] else {**known.versions, len(starts): now}
        _write_known(run.store, replace(known, starts=starts, versions=versions))
        attempt += len(starts)
        run.on_begin(int(attempt), start, run.world_size)
    if run.world_size > 1:
        dist.broadcast(attempt, src=0)
    return replace(run, attempt=int(attempt))


def check_owner(run: Run) -> None:
    """UserError if the folder is another's now."""
    if not run.owner:
        return
    try:
        owner = json.loads(run.store.read(LEASE)).get("owner")
    except (FileNotFoundError, ValueError, AttributeError):
        owner = None
    if owner != run.owner:
        raise UserError(f"somebody else has taken {run.store.url} over")


def check_newest(run: Run) -> None:
    """UserError if a newer attempt has begun, or another owner is there: this one may write nothing any more."""
    check_owner(run)
    newest = len(read_starts(run.store))
    if newest != run.attempt:
        raise UserError(f"attempt {newest} of {run.store.url} has taken over from attempt {run.attempt}")


def read_starts(store: Store) -> list[int]:
    """The step at which each attempt began, the first attempt's first."""
    return read_known(store).starts


def in_history(starts: Sequence[int], attempt: int, step: int) -> bool:
    """Whether the weights of the newest attempt descend from step `step` (counted from 0) of attempt `attempt`
    (from 1): no attempt after it began at that step or before (DESIGN.md, promise 3)."""
    return attempt <= len(starts) and all(start > step for start in starts[attempt:])


def check_trained_classes(store: Store, dataset: Dataset) -> None:
    """UserError where a dataset has other classes than a run was trained to name, or has them in another order."""
    try:
        trained, asked = json.loads(store.read(CLASSES)), dataset.manifest.classes
    except FileNotFoundError:
        raise UserError(
            f"{store.url} is of pre-training, and names no classes: fine-tune or probe it, or try `maestream knn`"
        ) from None
    if asked != trained:
        first = next(((a, b) for a, b in zip(asked, trained, strict=False) if a != b), None)
        where = f": {first[0]} is where {first[1]} was" if first else ""
        raise UserError(
            f"{dataset.store.url} has other classes ({len(asked)}) than {store.url} was trained on ({len(trained)}){where}"
        )


def write_failure(run: Run, reason: str) -> None:
    """Leave word of what stopped the run for good."""
    text = json.dumps({"attempt": run.attempt, "reason": reason}, indent=1)
    run.store.write(FAILED, (text + "\n").encode())


def forget_failure(store: Store) -> str | None:
    """What stopped the run for good the last time, if anything did: it has been read, and is to be tried again."""
    try:
        reason = str(json.loads(store.read(FAILED))["reason"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    store.remove([FAILED])
    return reason


def read_config(store: Store) -> RunConfig:
    """The config a run was started with."""
    try:
        tree = yaml.safe_load(store.read(CONFIG))
    except FileNotFoundError:
        raise UserError(f"{store.url} is not a run: it has no {CONFIG}") from None
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())  # it has several lines
        raise UserError(f"{store.describe(CONFIG)} cannot be read ({what})") from None
    task = tree.get("task", "pretrain") if isinstance(tree, dict) else None
    if task not in KINDS:
        raise UserError(f"{store.describe(CONFIG)} is of a run of another kind, or damaged")
    return parse_config(KINDS[task], tree, store.describe(CONFIG))
