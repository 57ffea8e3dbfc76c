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
from cluster.terminal import console, write_file
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
def pretrain(**how: Any) -> None:
    """Pre-train an MAE, or resume it."""
    _train("pretrain", **how)


@cli.command()
@trains
@click.option("--init", help="The run whose encoder is trained on; or scratch.")
@click.option("--val", help="A dataset with the same classes, to be evaluated on.")
def finetune(init: str | None, val: str | None, **how: Any) -> None:
    """Train an encoder and a head to name classes: all blocks, the last ones (blocks=2), or from scratch."""
    _train("finetune", **how, keys=keys_of(init, val))


@cli.command()
@trains
@click.option("--init", help="The run whose encoder is probed; or scratch.")
@click.option("--val", help="A dataset with the same classes, to be evaluated on.")
def linprobe(init: str | None, val: str | None, **how: Any) -> None:
    """Train a linear classifier on what a frozen encoder says."""
    _train("linprobe", **how, keys=keys_of(init, val))


for command in (checkpoints, doctor, evaluate, features, knn, manifests, report, study, submit):
    cli.add_command(command)


@cli.command()
@click.argument("run")
@click.option("--data", required=True, help="The dataset to look at; held-out images tell more.")
@click.option(
    "--grid", required=True, type=click.Path(dir_okay=False, writable=True), help="Where to write the PNG."
)
@click.option(
    "--count", type=click.IntRange(min=1), default=64, show_default=True, help="Images the error is over."
)
def reconstruct(run: str, data: str, grid: str, count: int) -> None:
    """A picture of original, masked and reconstructed images by a run's newest checkpoint, and its error."""
    from pipeline.decode import make_decoder
    from pipeline.storage import open_store
    from trainer.checkpoint import chosen_step, load_weights
    from trainer.config import PretrainConfig
    from trainer.device import best_device
    from trainer.mae import MAE
    from trainer.reconstruct import draw_grid, evenly_spread, reconstruct
    from trainer.run import read_config

    store = open_store(run)
    config = read_config(store)
    if not isinstance(config, PretrainConfig):
        raise UserError(f"{store.url} is a run of `maestream {config.task}`, which reconstructs nothing")
    step = chosen_step(store, None)
    dataset = open_dataset(data)
    model = MAE(config.model)
    load_weights(store, step, model)
    device = best_device()
    batch = evenly_spread(dataset, make_decoder("auto", config.model.size, 4), count)
    result = reconstruct(model.to(device), batch.images.to(device), batch.sample_ids.to(device), config.seed)
    write_file(grid, draw_grid(result))
    kind, baseline = "patches", "the mean of the visible pixels"
    if config.model.norm_pix:
        kind, baseline = "normalised patches", "each patch's own mean"
    console.print(
        f"step {step}: error over masked {kind} {result.error:.4f} ({len(batch.images)} images); filling with "
        f"{baseline} gives {result.baseline:.4f}, so {result.error / result.baseline:.0%} of it → {grid}"
    )
