"""`maestream shards statistics`."""

import click

from cluster.cli.options import seed_option, tasks_option
from cluster.terminal.console import console, progress_counter
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.statistics import STATISTICS, write_statistics
from pipeline.text import plural

MAX_PRINTED = 20  # images that cannot be read; the rest is counted


@click.command()
@click.argument("dest", metavar="DATASET")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Read a random sample of N images.  [default: all images]",
)
@seed_option("Seed of the random sample.")
@tasks_option("parallel tasks")
def statistics(dest: str, samples: int | None, seed: int, tasks: int | None) -> None:
    """Compute the mean and standard deviation of each channel.

    They are over all pixels of all images, or of a random sample; 8-bit pixels are divided by 255, 16-bit pixels by 65535, and
    floats are taken as they are. They are written to statistics.json in the dataset, and used in training with
    data.normalise=dataset.
    """
    from cluster.runtime.task_pool import task_pool
    from pipeline.loading.statistics import compute_statistics

    dataset = open_dataset(dest)
    total = min(samples or dataset.samples, dataset.samples)
    with task_pool(tasks) as run, progress_counter("images", total) as advance:
        result = compute_statistics(dataset, samples, seed, run, advance)
    for line in result.bad[:MAX_PRINTED]:
        console.print(f"skipped {line}", style="yellow")
    if len(result.bad) > MAX_PRINTED:
        console.print(f"… and {len(result.bad) - MAX_PRINTED:,} more", style="yellow")
    found = result.statistics
    write_statistics(dataset, found)
    console.print(f"{'channel':>7}  {'mean':>10}  {'std':>10}")
    for number, (mean, std) in enumerate(zip(found.mean, found.std, strict=True), 1):
        console.print(f"{number:>7}  {mean:>10.5g}  {std:>10.5g}")
    console.print(
        f"mean and standard deviation of {found.source} ({found.dtype}, {plural(found.pixels, 'pixel')} each channel) written to "
        f"{dataset.store.describe(STATISTICS)}"
    )
