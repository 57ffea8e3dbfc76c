"""`maestream pretrain`, `finetune` and `linprobe`."""

from typing import Any

import click

from cluster.cli.options import TRAINING, training_options
from cluster.terminal.console import console

val_option = click.option(
    "--val",
    metavar="DATASET",
    help="Dataset to evaluate on, with the same kind of labels and classes.  [default: data.val of the recipe]",
)


def _init_option(what: str) -> Any:
    return click.option(
        "--init",
        metavar="WEIGHTS",
        help=f'Run, model folder or weights file whose encoder is {what}, or "scratch" for random weights.  [default: init of '
        "the recipe]",
    )


def _train(
    task: str,
    recipe: str,
    data: str,
    out: str,
    ledger: bool,
    overrides: tuple[str, ...],
    init: str | None,
    val: str | None = None,
) -> None:
    from trainer.config.recipe import CONFIG_TYPES, keys_from_options, load_config

    config = load_config(CONFIG_TYPES[task], recipe, overrides, keys_from_options(init, val))
    from cluster.elastic.driver import train

    train(config, data, out, console, ledger)
    console.print(f"done: {out}")


@click.command(epilog=TRAINING)
@training_options
@click.option(
    "--init",
    metavar="WEIGHTS",
    help="Run, model folder or weights file to start from.  [default: init of the recipe, or random weights]",
)
def pretrain(init: str | None, **options: Any) -> None:
    """Pre-train a Masked Autoencoder."""
    _train("pretrain", **options, init=init)


@click.command(epilog=TRAINING)
@training_options
@_init_option("fine-tuned")
@val_option
def finetune(init: str | None, val: str | None, **options: Any) -> None:
    """Fine-tune an encoder to predict labels.

    Trains all blocks and a linear head, or only the last N blocks with blocks=N. With --init scratch, it trains from random
    weights. The loss is cross-entropy for labels of one class, binary cross-entropy for several classes, and the squared error
    for numbers.
    """
    _train("finetune", **options, init=init, val=val)


@click.command(epilog=TRAINING)
@training_options
@_init_option("probed")
@val_option
def linprobe(init: str | None, val: str | None, **options: Any) -> None:
    """Train a linear layer that predicts labels on a frozen encoder."""
    _train("linprobe", **options, init=init, val=val)
