"""`maestream shards view`."""

import click

from cluster.cli.options import NumberRange, anonymous_option, seed_option
from cluster.cli.shards.common import summary
from cluster.terminal.console import console, progress_bar
from pipeline.dataset.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from pipeline.text import plural

MAX_PRINTED = 3  # keys that were not found; the rest is counted


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("dest")
@click.option(
    "--where",
    metavar="CONDITION",
    help="Take the samples for which this SQL condition holds, for example \"width >= 256 and label in ('dog', 'cat')\".",
)
@click.option(
    "--drop", metavar="FILE", help="Leave out the samples with these keys: a text file, one key per line."
)
@click.option(
    "--fraction",
    type=NumberRange(0, 1, min_open=True),
    metavar="F",
    help="Take this fraction of what --where and --drop leave, at random: exactly F times their number, rounded.",
)
@seed_option("Seed of --fraction. With the same seed, a smaller fraction is a part of a larger one.")
@click.option("--overwrite", is_flag=True, help="Replace a view in DEST.")
@anonymous_option("source", "SRC")
def view(
    source: str,
    dest: str,
    where: str | None,
    drop: str | None,
    fraction: float | None,
    seed: int,
    overwrite: bool,
) -> None:
    """Make a dataset of some samples of another, without copying images.

    Writes indexes and a manifest to DEST. The tars stay where they are, and are not changed. Classes keep their numbers.

    The columns for --where are key, label (the class name), label_number, width, height, size (bytes), shard (the name of the
    tar), and those that `maestream shards index --keep-json` kept.
    """
    from pipeline.views.view import Selection, make_view

    dataset = open_dataset(source)
    keys = _read_keys(drop) if drop is not None else []
    with progress_bar() as progress:
        task = progress.add_task("shards", total=dataset.manifest.shards)
        made = make_view(
            dataset,
            open_store(dest),
            Selection(where, keys, fraction, seed),
            overwrite,
            on_shard=lambda: progress.advance(task),
        )
    if made.unknown:
        listed = ", ".join(made.unknown[:MAX_PRINTED]) + (", …" if len(made.unknown) > MAX_PRINTED else "")
        console.print(
            f"{len(made.unknown):,} of {plural(len(set(keys)), 'key')} in {drop} are not in {source}: {listed}",
            style="yellow",
        )
    share = made.manifest.samples / max(dataset.samples, 1)
    console.print(f"wrote {summary(made.manifest)}, {share:.1%} of the samples of {source}, to {dest}")
    console.print(
        f"{made.bytes / 1000:,.1f} kB written; the tars stay in {dataset.shard_store.describe()}. Classes keep the numbers of "
        f"{source}; {made.classes:,} of {len(made.manifest.classes):,} have samples"
    )


def _read_keys(path: str) -> list[str]:
    """The keys in a text file. UserError if it cannot be read."""
    folder, _, name = open_store(path).url.rpartition("/")
    try:
        text = open_store(folder or "/").read(name).decode()
    except FileNotFoundError:
        raise UserError(f"--drop {path}: no such file") from None
    except ValueError:
        raise UserError(f"--drop {path} is not a text file in UTF-8") from None
    return [line for line in text.splitlines() if line.strip()]
