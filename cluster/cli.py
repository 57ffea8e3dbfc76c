"""What people type."""

import json
import sys
from typing import Any

import click

from cluster import bench_step
from cluster.bench import bench
from cluster.checkpoints import checkpoints
from cluster.deploy import manifests
from cluster.doctor import doctor
from cluster.judge import evaluate, features, knn
from cluster.options import keys_of, trains
from cluster.report import report
from cluster.shards import shards
from cluster.study import study
from cluster.submit import submit
from cluster.terminal import console
from cluster.weights import export, import_, reconstruct
from pipeline.errors import UserError
from pipeline.manifest import open_dataset

SEED = click.IntRange(min=0, max=2**31 - 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="maestream")
def cli() -> None:
    """Pre-train Masked Autoencoders straight from WebDataset shards in a folder or a bucket.

    Every path may be s3://bucket/prefix; endpoint and keys come from the usual AWS variables.
    """


def main() -> None:
    """The console command. What only a person can mend is one message and exit code 2."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        click.echo(f"maestream: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("maestream: interrupted", err=True)
        sys.exit(130)


bench.add_command(bench_step.step)
bench.add_command(bench_step.end_to_end)
cli.add_command(bench)
cli.add_command(shards)


@cli.command()
@click.argument("dest")
@click.option("--global-batch", type=click.IntRange(min=1), required=True)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--epoch", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--world-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--steps", help="Steps of the epoch, from:to; all without it.")
@click.option("--lanes", type=click.IntRange(min=1), help="V; without it as a run would fix it.")
@click.option("--block", type=click.IntRange(min=1), help="K; without it as a run would fix it.")
def order(dest: str, steps: str | None, rank: int, world_size: int, epoch: int, **fixed: Any) -> None:
    """Which samples a worker sees, as JSON lines, one a step: ids, keys, crops (y, x, h, w), flips."""
    from pipeline.augment import random_flips, random_resized_crops
    from trainer.config import DataConfig, PretrainConfig, WorkersConfig
    from trainer.run import fix_order, make_order

    if rank >= world_size:
        raise UserError(f"--rank {rank} of --world-size {world_size}: ranks go from 0 to {world_size - 1}")
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
        ids = order.step_ids(epoch * order.steps_per_epoch + step, rank, world_size)
        located = dataset.locate(ids)
        crops = random_resized_crops(order.seed, epoch, ids, located.height, located.width)
        line = {
            "step": step,
            "sample_ids": ids.tolist(),
            "keys": dataset.keys(ids),
            "crops": crops.tolist(),
            "flips": random_flips(order.seed, epoch, ids).tolist(),
        }
        click.echo(json.dumps(line))


def _steps(text: str | None, steps_per_epoch: int) -> range:
    if text is None:
        return range(steps_per_epoch)
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit()):
        raise UserError(f"--steps {text}: write from:to, 0:10 say")
    if int(last) > steps_per_epoch:
        raise UserError(f"--steps {text}: an epoch has {steps_per_epoch} steps")
    return range(int(first), int(last))


def _train(
    task: str,
    recipe: str,
    data: str,
    out: str,
    ledger: bool,
    overrides: tuple[str, ...],
    keys: dict[str, Any] | None = None,
) -> None:
    from trainer.recipe import KINDS, load_config

    config = load_config(KINDS[task], recipe, overrides, keys)
    from cluster.train import train

    train(config, data, out, console, ledger)
    console.print(f"done: {out}")


@cli.command()
@trains
@click.option("--init", help="A run, or others' weights, that it begins with.")
def pretrain(init: str | None, **how: Any) -> None:
    """Pre-train an MAE, or resume it."""
    _train("pretrain", **how, keys=keys_of(init, None))


@cli.command()
@trains
@click.option("--init", help="The run, or others' weights, whose encoder is trained on; or scratch.")
@click.option("--val", help="A dataset with the same classes, to be evaluated on.")
def finetune(init: str | None, val: str | None, **how: Any) -> None:
    """Train an encoder and a head to name classes: all blocks, the last ones (blocks=2), or from scratch."""
    _train("finetune", **how, keys=keys_of(init, val))


@cli.command()
@trains
@click.option("--init", help="The run, or others' weights, whose encoder is probed; or scratch.")
@click.option("--val", help="A dataset with the same classes, to be evaluated on.")
def linprobe(init: str | None, val: str | None, **how: Any) -> None:
    """Train a linear classifier on what a frozen encoder says."""
    _train("linprobe", **how, keys=keys_of(init, val))


for command in (
    checkpoints, doctor, evaluate, export, features, import_, knn, manifests, reconstruct, report, study, submit,
):  # fmt: skip
    cli.add_command(command)
