"""The group of `maestream shards`."""

import click

from cluster.cli.shards.build import build
from cluster.cli.shards.index import index
from cluster.cli.shards.show import show
from cluster.cli.shards.verify import verify


@click.group()
def shards() -> None:
    """Build, index, show and verify datasets of WebDataset shards."""


for command in (build, index, show, verify):
    shards.add_command(command)
