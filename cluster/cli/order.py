"""`maestream order`: print the samples, crops and flips of each step."""

import json
from typing import Any

import click

from cluster.cli.options import seed_option
from pipeline.dataset.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.text import plural


@click.command()
@click.argument("dest", metavar="DATASET")
@click.option(
    "--global-batch",
    type=click.IntRange(min=1),
    metavar="N",
    required=True,
    help="Samples per step, over all workers.",
)
@seed_option("Seed of the order, crops and flips.")
@click.option(
    "--epoch",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Epoch, counted from 0.",
)
@click.option(
    "--world-size",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    show_default=True,
    help="Number of workers.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Worker to print, counted from 0.",
)
@click.option(
    "--steps", metavar="FROM:TO", help="Steps of the epoch, counted from 0, without TO.  [default: all]"
)
@click.option(
    "--lanes",
    type=click.IntRange(min=1),
    metavar="N",
    help="data.lanes of a run.  [default: what a new run would choose]",
)
@click.option(
    "--block",
    type=click.IntRange(min=1),
    metavar="N",
    help="data.block of a run.  [default: what a new run would choose]",
)
def order(dest: str, steps: str | None, rank: int, world_size: int, epoch: int, **fixed: Any) -> None:
    """Print the samples that a worker gets, step by step.

    Prints a JSON line per step: sample ids, keys, crops (y, x, height, width) and flips. No image is read.
    """
    from pipeline.loading.crops import random_flips, random_resized_crops
    from trainer.config.schema import DataConfig, PretrainConfig, WorkersConfig
    from trainer.run.run import fix_order, make_order

    if rank >= world_size:
        raise UserError(f"--rank {rank} with --world-size {world_size}: ranks go from 0 to {world_size - 1}")
    dataset = open_dataset(dest)
    data = DataConfig(lanes=fixed["lanes"], block=fixed["block"])
    config = PretrainConfig(
        global_batch=fixed["global_batch"],
        seed=fixed["seed"],
        workers=WorkersConfig(max=world_size),
        data=data,
    )
    order = make_order(fix_order(config, dataset), dataset)
    for step in _steps(steps, order.steps_per_epoch):
        draws = order.step_draws(epoch * order.steps_per_epoch + step, rank, world_size)
        ids = draws % order.samples
        located = dataset.locate(ids)
        crops = random_resized_crops(order.seed, epoch, draws, located.height, located.width)
        line = {
            "step": step,
            "sample_ids": ids.tolist(),
            "keys": dataset.keys(ids),
            "crops": crops.tolist(),
            "flips": random_flips(order.seed, epoch, draws).tolist(),
        }
        click.echo(json.dumps(line))


def _steps(text: str | None, steps_per_epoch: int) -> range:
    if text is None:
        return range(steps_per_epoch)
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit()):
        raise UserError(f"--steps {text}: expected FROM:TO, for example 0:10")
    if int(last) > steps_per_epoch:
        raise UserError(f"--steps {text}: an epoch has only {plural(steps_per_epoch, 'step')}")
    return range(int(first), int(last))
