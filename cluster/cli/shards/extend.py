"""`maestream shards extend`."""

import tempfile
from pathlib import Path

import click

from cluster.cli.shards.common import NO_CHECKSUMS, summary
from cluster.terminal.console import console, progress_bar
from pipeline.storage.store import TEMPORARY
from pipeline.text import plural


@click.command()
@click.argument("dest", metavar="DATASET")
@click.argument("sources", nargs=-1, required=True, metavar="NEW...")
@click.option("--skip-damaged", is_flag=True, help="Skip damaged samples of new tars, instead of stopping.")
def extend(dest: str, sources: tuple[str, ...], skip_damaged: bool) -> None:
    """Add new shards to a dataset, without copying images.

    NEW is a dataset, a tar, or a folder of tars; if it is the folder of DATASET's own tars, those that are new are added. Their
    samples come after all others, so the samples of DATASET keep their ids and labels.

    A run with data.grow=true continues with the larger dataset from its next epoch on.
    """
    from pipeline.views.extend import extend_dataset

    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder, progress_bar() as progress:
        task = progress.add_task("shards", total=None)
        made = extend_dataset(dest, sources, Path(folder), skip_damaged, lambda: progress.advance(task))
    if made.known:
        console.print(f"left out {plural(made.known, 'tar')} that {dest} has already")
    console.print(
        f"added {plural(made.samples, 'image')} in {plural(made.shards, 'shard')}; {dest} now has {summary(made.manifest)}"
    )
    console.print(f"{made.bytes / 1000:,.1f} kB written; the tars stay where they are")
    if made.classes:
        console.print(
            f"{plural(len(made.classes), 'new class', 'new classes')}, numbered after the others: {', '.join(made.classes[:12])}"
        )
    if not made.manifest.checksums:
        console.print(NO_CHECKSUMS)
