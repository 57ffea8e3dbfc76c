"""A run that nothing disturbs, not even Ray: what others are compared with."""

from pathlib import Path

import torch
from gloo import gloo_group, run_workers

from pipeline.cores import available_cores
from pipeline.manifest import open_dataset
from pipeline.storage import open_store
from trainer.initial import fix_init
from trainer.recipe import KINDS, load_config
from trainer.run import Run, fix_order, found_run
from trainer.tasks import LOOPS


def train_undisturbed(task: str, recipe: Path, overrides: tuple[str, ...], data: str, out: Path) -> None:
    """As many workers as the recipe wants, with the threads that they have on Ray: sums come out the same to the last bit."""
    workers = load_config(KINDS[task], recipe, overrides).workers.max
    run_workers(_worker, workers, task, str(recipe), overrides, data, str(out))


def _worker(
    rank: int, workers: int, task: str, recipe: str, overrides: tuple[str, ...], data: str, out: str
) -> None:
    torch.set_num_threads(max(1, available_cores() // workers))
    with gloo_group(f"{out}.rendezvous", rank, workers):
        dataset = open_dataset(data)
        config = fix_order(fix_init(load_config(KINDS[task], recipe, overrides)), dataset)
        run = Run(open_store(out), Path(out).name, 1, rank, workers)
        if rank == 0:
            found_run(config, run, dataset)
        assert LOOPS[task](config, dataset, run)
