"""The group of `maestream shards`."""

import click

from cluster.cli.shards.build import build
from cluster.cli.shards.extend import extend
from cluster.cli.shards.index import index
from cluster.cli.shards.mix import mix
from cluster.cli.shards.show import show
from cluster.cli.shards.statistics import statistics
from cluster.cli.shards.verify import verify
from cluster.cli.shards.view import view


@click.group()
def shards() -> None:
    """Build, index, select, mix, extend, show, measure and verify datasets of WebDataset shards."""


for command in (build, index, view, mix, extend, show, statistics, verify):
    shards.add_command(command)
