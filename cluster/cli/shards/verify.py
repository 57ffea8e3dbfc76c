"""`maestream shards verify`."""

import sys

import click

from cluster.cli.options import anonymous_option, tasks_option
from cluster.cli.shards.common import NO_CHECKSUMS
from cluster.terminal.console import console, progress_bar
from pipeline.dataset.dataset import open_dataset
from pipeline.text import plural


@click.command()
@click.argument("dest", metavar="DATASET")
@click.option(
    "--repair",
    is_flag=True,
    help="Rewrite damaged indexes and manifests from the tars. Damaged tars have to be built again.",
)
@tasks_option("shards to read in parallel")
@anonymous_option("dest", "DATASET")
def verify(dest: str, repair: bool, tasks: int | None) -> None:
    """Verify a dataset: read every byte, decode every image.

    Lists all problems, and exits with code 1 if there are any.
    """
    from cluster.runtime.task_pool import task_pool
    from pipeline.dataset.repair import repair as repair_dataset
    from pipeline.dataset.verify import verify

    total = None if repair else open_dataset(dest).manifest.shards
    with task_pool(tasks) as run, progress_bar() as progress:
        task = progress.add_task("shards", total=total)
        if repair:
            repaired = repair_dataset(dest, run, on_shard=lambda: progress.advance(task))
        else:
            problems = verify(open_dataset(dest), run, on_shard=lambda: progress.advance(task))
    if repair:
        for line in repaired.repaired:
            console.print(f"repaired {line}")
        problems = repaired.unrepaired
    dataset = open_dataset(dest)
    for problem in problems:
        console.print(f"damaged {problem}", style="red")
    if problems:
        console.print(f"{plural(len(problems), 'problem')} in {dataset.store.url}")
        sys.exit(1)
    console.print(
        f"{plural(dataset.samples, 'image')} in {plural(dataset.manifest.shards, 'shard')} verified, "
        f"{'all intact' if dataset.manifest.checksums else 'all decode'}: {dataset.store.url}"
    )
    if not dataset.manifest.checksums:
        console.print(NO_CHECKSUMS)
