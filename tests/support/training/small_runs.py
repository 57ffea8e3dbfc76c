"""Pre-training runs of a tiny model, in this process or in several workers without Ray."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.storage.store import open_store
from tests.support.training.gloo import gloo_group, run_workers
from trainer.config.recipe import parse_config
from trainer.config.schema import PretrainConfig
from trainer.group.requests import Request
from trainer.run.checkpoint import committed_steps
from trainer.run.run import Run, create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.train.pretrain import pretrain

SMALL: dict[str, Any] = {
    "global_batch": 12,
    "epochs": 6.0,  # of 5 steps
    "log_every": 4,
    "precision": "float64",
    "model": {
        "image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3,
        "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2,
    },
    "optim": {"blr": 0.05, "warmup_epochs": 1},
    "data": {"decoder": "cpu", "lanes": 4, "block": 8, "threads": 1},
}  # fmt: skip


def config_of(**changes: Any) -> PretrainConfig:
    return parse_config(PretrainConfig, {**SMALL, **changes}, "test")


def train(dataset: Dataset, out: Path, rank: int = 0, world_size: int = 1, **changes: Any) -> Run:
    config = config_of(**changes)
    config, run = open_run(str(out), config, dataset)
    create_run(config, run, dataset)
    pretrain(config, dataset, run, Worker(), Callbacks())
    return run


def request_after(steps: int, request: Request) -> Callable[[], Request]:
    """Return a `Callbacks.request` that gives `request` after `steps` steps, and from then on."""
    calls = itertools.count(1)
    return lambda: request if next(calls) >= steps else Request.NONE


class Interrupted(Exception):  # noqa: N818  # not an error
    """Ends a run as if its process had been killed."""


def interrupt_after(steps: int) -> Callable[[], Request]:
    """Return a `Callbacks.request` that ends the run after `steps` steps."""
    calls = itertools.count()

    def request() -> Request:
        if next(calls) == steps:
            raise Interrupted
        return Request.NONE

    return request


def train_worker(
    rank: int,
    world_size: int,
    data: str,
    out: str,
    changes: dict[str, Any],
    request: Request = Request.NONE,
) -> None:
    torch.set_num_threads(1)
    with gloo_group(f"{out}.rendezvous", rank, world_size) as group:
        dataset = open_dataset(data)
        config = config_of(**changes)
        run, callbacks = Run(open_store(out), Path(out).parent.name, 1), Callbacks()
        if rank == 0:
            create_run(config, run, dataset)
        else:
            callbacks = Callbacks(request_after(9 + rank, request))
        assert pretrain(config, dataset, run, Worker(group, ledger=True), callbacks) == (
            request is Request.NONE
        )


def weights(url: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    store = open_store(str(url))
    return load_file(f"{store.root}/checkpoints/step-{committed_steps(store)[-1]:08d}/model.safetensors")


def spawn(world_size: int, *arguments: Any) -> None:
    run_workers(train_worker, world_size, *arguments)
