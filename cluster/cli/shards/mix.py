"""`maestream shards mix`."""

import re

import click
import numpy as np

from cluster.cli.shards.common import summary
from cluster.terminal.console import console, progress_bar
from pipeline.dataset.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from pipeline.text import plural

WEIGHT = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+|[0-9]+/[0-9]+")


class MixCommand(click.Command):
    """A command whose option --weights takes all numbers that follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        joined: list[str] = []
        for arg in args:
            if joined[-1:] == ["--weights"] or (
                joined[-2:-1] == ["--weights"] and WEIGHT.fullmatch(arg) and re.search(r"[0-9]$", joined[-1])
            ):
                joined[-1:] = ["--weights", arg] if joined[-1] == "--weights" else [f"{joined[-1]},{arg}"]
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


@click.command(cls=MixCommand)
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.argument("dest")
@click.option(
    "--weights",
    metavar="W...",
    help="How often each sample of each SRC is seen per epoch, for example --weights 1 0.5 3.  [default: 1 for each]",
)
@click.option("--overwrite", is_flag=True, help="Replace a mix in DEST.")
def mix(sources: tuple[str, ...], dest: str, weights: str | None, overwrite: bool) -> None:
    """Make one dataset of the samples of several, without copying images.

    Writes indexes and a manifest to DEST. The tars stay where they are, also in several buckets, and are not changed.

    With weight 0.5, an epoch has one half of the samples of SRC, and the next epoch the other half; with weight 3, it has each
    sample three times. If the datasets have different classes, the mix has all of them.
    """
    from pipeline.views.mix import make_mix, parse_weight

    texts = re.split(r"[,\s]+", weights.strip()) if weights is not None else ["1"] * len(sources)
    if len(texts) != len(sources):
        raise UserError(
            f"{plural(len(texts), 'weight')} for {plural(len(sources), 'dataset')}: give one for each"
        )
    parsed = [parse_weight(text) for text in texts]
    datasets = [open_dataset(source) for source in sources]
    with progress_bar() as progress:
        task = progress.add_task("shards", total=sum(dataset.manifest.shards for dataset in datasets))
        made = make_mix(
            datasets, parsed, open_store(dest), overwrite, on_shard=lambda: progress.advance(task)
        )
    mixed = open_dataset(dest)
    total = 0.0
    for part, count in zip(mixed.parts, np.diff(mixed.part_starts).tolist(), strict=True):
        console.print(
            f"{part.name}: {plural(count, 'sample')} × {part.weight} = {float(count * part.times):,.10g} per epoch, from {part.url}"
        )
        total += float(count * part.times)
    console.print(f"wrote {summary(made.manifest)}, {total:,.10g} samples per epoch, to {dest}")
    console.print(f"{made.bytes / 1000:,.1f} kB written; the tars stay where they are")
    if made.renumbered:
        console.print(
            f"the classes differ: the mix has all {len(made.manifest.classes):,}, and other numbers for those of "
            f"{', '.join(made.renumbered)}"
        )
    if made.without_checksums:
        console.print(
            f"the mix has no checksums, because {', '.join(made.without_checksums)} has none (`maestream shards index "
            "--checksums --overwrite` adds them)",
            style="yellow",
        )
    if made.lost:
        console.print(f"columns of different types were left out: {', '.join(made.lost)}", style="yellow")
