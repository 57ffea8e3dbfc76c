"""A run and its folder: who it is, what was fixed when it first started, and this worker's place in it.

RUN/config.yaml          the config, with B, V, K as fixed
RUN/run.json             run id, dataset fingerprint, the newest attempt
RUN/metrics.jsonl        a row a step (on object stores: RUN/metrics/, see trainer.metrics)
RUN/checkpoints/step-…/  see trainer.checkpoint
RUN/tensorboard/  RUN/pictures/
"""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from pipeline.cache import CHUNK_BYTES
from pipeline.errors import UserError
from pipeline.manifest import Dataset
from pipeline.order import Order, default_block, default_lanes
from pipeline.storage import TEMPORARY, Store, open_store
from trainer.config import PretrainConfig, differences, dump_config, parse_config

CONFIG = "config.yaml"
RUN = "run.json"


@dataclass(frozen=True)
class Run:
    """What a training loop is handed: where to report and checkpoint, and which worker it is."""

    store: Store
    run_id: str
    attempt: int  # 1 for a run's first start, one more for each start after
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_metrics: Callable[[dict[str, Any]], None] = lambda row: None  # for the console; rank 0 only


def fix_order(config: PretrainConfig, dataset: Dataset) -> PretrainConfig:
    """The config with lanes V and block K filled in. UserError where they do not fit the dataset."""
    lanes = config.data.lanes or default_lanes(config.global_batch)
    memory = int(config.data.memory_gb * 2**30)
    block = config.data.block or default_block(lanes, dataset.mean_sample_bytes, CHUNK_BYTES, memory)
    fixed = config.model_copy(
        update={"data": config.data.model_copy(update={"lanes": lanes, "block": block})}
    )
    make_order(fixed, dataset).lanes_of(0, config.workers)
    return fixed


def make_order(config: PretrainConfig, dataset: Dataset) -> Order:
    """The order of a config whose lanes and block are fixed."""
    assert config.data.lanes is not None
    assert config.data.block is not None
    return Order(
        dataset.shard_samples, config.seed, config.global_batch, config.data.lanes, config.data.block
    )


def open_run(url: str, config: PretrainConfig, dataset: Dataset) -> tuple[PretrainConfig, Run]:
    """A run in a new folder, or the next attempt of the one that is there. Writes nothing: `begin_attempt` does.

    Returns the config as fixed when the run first started, and the run (rank 0 of 1).
    UserError where the folder belongs to another dataset or config, or is something else.
    """
    store = open_store(url)
    try:
        known = json.loads(store.read(RUN))
        run_id, fingerprint, attempt = known["run_id"], known["fingerprint"], known["attempt"]
    except FileNotFoundError:
        return _new_run(store, config, dataset)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{store.describe(RUN)} is damaged ({error}): choose another --out") from None
    if fingerprint != dataset.fingerprint:
        raise UserError(
            f"{store.url} was started with another dataset (fingerprint {fingerprint[:12]}, "
            f"{dataset.store.url} has {dataset.fingerprint[:12]}): give that one, or another --out"
        )
    before = read_config(store)
    fixed = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={
                    "lanes": config.data.lanes or before.data.lanes,
                    "block": config.data.block or before.data.block,
                }
            )
        }
    )
    if changed := differences(before, fixed):
        raise UserError(
            f"{store.url} was started with another config ({'; '.join(changed)}): "
            "these are fixed for a run, so give the old values, or another --out"
        )
    make_order(fixed, dataset).lanes_of(0, fixed.workers)
    return fixed, Run(store, run_id, attempt + 1)


def _new_run(store: Store, config: PretrainConfig, dataset: Dataset) -> tuple[PretrainConfig, Run]:
    ours = (CONFIG, TEMPORARY)  # a start may have been killed here
    if names := [name for name in store.names() if not name.startswith(ours)]:
        raise UserError(f"{store.url} is not empty and not a run ({names[0]}, …): choose another --out")
    return fix_order(config, dataset), Run(store, uuid.uuid4().hex, attempt=1)


def begin_attempt(config: PretrainConfig, run: Run, dataset: Dataset) -> None:
    """Write what `open_run` found into the run's folder: from now on it is this run's."""
    if run.attempt == 1:
        run.store.write(CONFIG, dump_config(config).encode())
    text = json.dumps({"run_id": run.run_id, "fingerprint": dataset.fingerprint, "attempt": run.attempt})
    run.store.write(RUN, (text + "\n").encode())


def read_config(store: Store) -> PretrainConfig:
    """The config a run was started with."""
    try:
        tree = yaml.safe_load(store.read(CONFIG))
    except FileNotFoundError:
        raise UserError(f"{store.url} is not a run: it has no {CONFIG}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{store.describe(CONFIG)} cannot be read ({error})") from None
    return parse_config(PretrainConfig, tree, store.describe(CONFIG))
