"""Options that several commands share."""

import functools
import math
from collections.abc import Callable
from typing import Any

import click

from pipeline.errors import UserError
from pipeline.storage.file_systems import anonymous_url


class NumberRange(click.FloatRange):
    """A range of numbers. Unlike click's, it has neither NaN, which passes every comparison there, nor infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number", param, ctx)
        return number


OVERRIDES = (
    "key=value arguments override keys of the recipe, for example epochs=100 or model.decoder_depth=4."
)
TRAINING = (
    f"{OVERRIDES} Run the same command again to resume from the newest checkpoint. Training runs on the Ray cluster at "
    "RAY_ADDRESS; without it, Ray is started on this machine."
)


def anonymous_option(parameter: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add --anonymous, with which the URL in a parameter of the command is read without credentials.

    Args:
        parameter: name of the parameter.
        what: how the command's help calls it.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*arguments: Any, anonymous: bool, **options: Any) -> None:
            if anonymous:
                options[parameter] = anonymous_url(options[parameter])
            command(*arguments, **options)

        text = f"Read {what} without credentials: an s3:// or gs:// bucket that is open to everyone."
        return click.option("--anonymous", is_flag=True, help=text)(run)

    return add


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the commands that train, or prepare training."""
    command = anonymous_option("data", "the dataset of --data")(command)
    for option in reversed(
        (
            click.option(
                "--config",
                "recipe",
                required=True,
                type=click.Path(dir_okay=False),
                help="Recipe: a YAML file such as those in recipes/.",
            ),
            click.option("--data", required=True, metavar="DATASET", help="Dataset to train on."),
            click.option(
                "--out",
                required=True,
                metavar="FOLDER",
                help="Run folder. If it already contains this run, training resumes.",
            ),
            click.option("--ledger", is_flag=True, help="Record the sample ids of each step in the metrics."),
            click.argument("overrides", nargs=-1, metavar="[key=value]..."),
        )
    ):
        command = option(command)
    return command


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not height.isdigit() or not (width or height).isdigit():
        raise UserError(
            f"--image-size {text}: expected one number, or HEIGHTxWIDTH, for example 384 or 384x512"
        )
    return int(height), int(width or height)


def tasks_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add --tasks. `what`: what it is the number of."""
    return click.option(
        "--tasks",
        type=click.IntRange(min=1),
        metavar="N",
        help=f"Number of {what}.  [default: number of CPU cores]",
    )


def seed_option(text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add --seed. `text`: its help."""
    return click.option(
        "--seed",
        type=click.IntRange(min=0, max=2**31 - 1),
        metavar="N",
        default=0,
        show_default=True,
        help=text,
    )


step_option = click.option(
    "--step", type=click.IntRange(min=1), metavar="N", help="Step of the checkpoint.  [default: the newest]"
)
image_size_option = click.option(
    "--image-size",
    "size",
    callback=lambda context, option, text: _parse_size(text),
    metavar="N|HxW",
    help="Image size, if it differs from that of training: position embeddings are interpolated.",
)
