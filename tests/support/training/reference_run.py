"""Reference runs: uninterrupted, without Ray. Other runs are compared with them."""

from pathlib import Path

import torch

from pipeline.cpus import available_cores
from pipeline.dataset.dataset import open_dataset
from pipeline.storage.store import open_store
from tests.support.training.gloo import gloo_group, run_workers
from trainer.config.recipe import CONFIG_TYPES, load_config
from trainer.run.run import Run, create_run, fix_order
from trainer.run.worker import Callbacks, Worker
from trainer.train.registry import TRAIN_FUNCTIONS
from trainer.weights.init import resolve_init


def train_reference_run(task: str, recipe: Path, overrides: tuple[str, ...], data: str, out: Path) -> None:
    """Train with as many workers as the recipe asks for, each with as many threads as on Ray, so that sums are bit-identical."""
    workers = load_config(CONFIG_TYPES[task], recipe, overrides).workers.max
    run_workers(_worker, workers, task, str(recipe), overrides, data, str(out))


def _worker(
    rank: int, workers: int, task: str, recipe: str, overrides: tuple[str, ...], data: str, out: str
) -> None:
    torch.set_num_threads(max(1, available_cores() // workers))
    with gloo_group(f"{out}.rendezvous", rank, workers) as group:
        dataset = open_dataset(data)
        config = fix_order(resolve_init(load_config(CONFIG_TYPES[task], recipe, overrides)), dataset)
        run = Run(open_store(out), Path(out).name, 1)
        if rank == 0:
            create_run(config, run, dataset)
        assert TRAIN_FUNCTIONS[task](config, dataset, run, Worker(group), Callbacks())
