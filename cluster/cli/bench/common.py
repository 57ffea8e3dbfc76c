"""Options and output that the benchmark commands share."""

import datetime
import json
import shlex
import sys
from typing import Any

import click

from cluster.cli.options import NumberRange
from cluster.terminal.console import console, write_file
from pipeline.errors import UserError
from pipeline.text import plural

# What limits a loader, and what to do about it; by the keys of `pipeline.loading.benchmark.bottleneck`.
BOTTLENECKS = {
    "storage": "storage is the bottleneck: the reading thread waits for data {busy:.0%} of the time. Cache a part of the "
    "dataset on a local disk (--cache, or data.cache in training), or move the data closer",
    "reading": "the reading thread is the bottleneck: it is busy {busy:.0%} of the time. More workers on the machine would "
    "help",
    "decoding": "decoding is the bottleneck: the decoder threads are busy {busy:.0%} of the time. More cores would help",
    None: "there is no single bottleneck: stages wait for each other (decoding is busy {busy:.0%} of the time). A larger "
    "global batch may help",
}

json_option = click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, writable=True),
    help="Write all results to this JSON file.",
)


def step_options(command: Any) -> Any:
    """Add the options that `bench step` and `bench end-to-end` share."""
    for option in reversed(
        (
            click.option(
                "--batch",
                type=click.IntRange(min=1),
                metavar="N",
                help="Images per step.  [default: 256 on a GPU, else 8]",
            ),
            click.option(
                "--seconds",
                type=NumberRange(min=0, min_open=True),
                metavar="N",
                default=10,
                show_default=True,
                help="Duration of each measurement in seconds.",
            ),
            json_option,
        )
    ):
        command = option(command)
    return command


def load_step_config(recipe: str, overrides: tuple[str, ...], batch: int | None, device_type: str) -> Any:
    """Return the PretrainConfig of a recipe with `batch` images per step, all in one micro-batch.

    Raises:
        UserError: if the recipe or an override is invalid, or `micro_batch` is "auto".
    """
    from trainer.config.recipe import load_config
    from trainer.config.schema import PretrainConfig

    n = batch or (256 if device_type == "cuda" else 8)
    config = load_config(PretrainConfig, recipe, (f"global_batch={n}", f"micro_batch={n}", *overrides))
    if config.micro_batch == "auto":
        raise UserError("micro_batch=auto is only for training: set --batch here")
    return config


def describe_invocation() -> dict[str, Any]:
    """Return the date (UTC) and the command line, for the results file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "command": shlex.join(["maestream", *sys.argv[1:]]),
    }


def describe_device(device: Any, config: Any) -> dict[str, Any]:
    """Return what the results depend on besides the model: device, cores, torch, precision, and the measured peak of
    matrix products."""
    import torch

    from pipeline.cpus import available_cores
    from pipeline.loading.benchmark import cpu_model
    from trainer.config.device import autocast, should_compile, weight_dtype
    from trainer.train.benchmark import matmul_peak

    with autocast(config, device):
        is_autocast = torch.is_autocast_enabled(device.type)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "cores": available_cores(),
        "torch": torch.__version__,
        "precision": "bf16" if is_autocast else str(weight_dtype(config)).removeprefix("torch."),
        "compiled": should_compile(config, device),
        "peak_tflop_per_s": matmul_peak(config, device) / 1e12,
    }


def bad_samples_line(count: int) -> str:
    return f"{plural(count, 'bad sample')}: run `maestream shards verify` for their names"


def write_results(file: str | None, result: dict[str, Any]) -> None:
    """Write the results as JSON, if there is a file for them."""
    if file:
        write_file(file, (json.dumps(result, indent=2) + "\n").encode())
        console.print(f"wrote all results to {file}")
