"""Options of several commands."""

from collections.abc import Callable
from typing import Any

import click


def trains(command: Callable[..., None]) -> Callable[..., None]:
    """The options of what trains."""
    for option in reversed(
        (
            click.option(
                "--config",
                "recipe",
                required=True,
                type=click.Path(dir_okay=False),
                help="A recipe, recipes/*.yaml.",
            ),
            click.option("--data", required=True, help="The dataset."),
            click.option("--out", required=True, help="The run folder; the same command again resumes."),
            click.option("--ledger", is_flag=True, help="Metrics name the samples of each step."),
            click.argument("overrides", nargs=-1, metavar="[key=value]..."),
        )
    ):
        command = option(command)
    return command


def keys_of(init: str | None, val: str | None) -> dict[str, Any]:
    """Options that are keys of the config."""
    keys: dict[str, Any] = {"data": {"val": val}} if val else {}
    if init:
        keys["init"] = "scratch" if init == "scratch" else {"run": init}
    return keys
