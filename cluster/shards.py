"""`maestream shards`: what is done to datasets."""

import sys
import time
from typing import Any

import click
from rich.table import Table

from cluster.terminal import BuildProgress, console, progress_bar, write_file
from pipeline.manifest import open_dataset

NO_CHECKSUMS = (
    "only headers were read, so flipped bytes of an image will not be noticed unless it no longer decodes: "
    "`maestream shards index --checksums --overwrite` adds checksums"
)
NAMED = 20  # of what is left out so many are printed
SIDE = click.IntRange(min=16, max=65_500)
SEED = click.IntRange(min=0, max=2**31 - 1)


@click.group()
def shards() -> None:
    """Build, look at and verify sharded datasets."""


@shards.command()
@click.argument("source")
@click.argument("dest")
@click.option(
    "--shard-mb", type=click.FloatRange(min=0.01), default=128, show_default=True, help="Size of a shard."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the shuffle.")
@click.option(
    "--devkit", metavar="FILE", help="ILSVRC2012_devkit_t12.tar.gz: labels of ILSVRC2012_img_val.tar."
)
@click.option(
    "--check",
    type=click.Choice(["decode", "header"]),
    default="decode",
    show_default=True,
    help="What is looked at of each image.",
)
@click.option("--shorter-side", type=SIDE, help="Make larger images smaller, to so many pixels.")
@click.option("--longer-side", type=SIDE, help="The same for the longer side.")
@click.option("--rgb-jpeg", is_flag=True, help="Make an RGB JPEG of what is a PNG, a WebP or CMYK.")
@click.option(
    "--quality",
    type=click.IntRange(1, 100),
    default=90,
    show_default=True,
    help="Of JPEGs that are made; the bytes of all other images are not touched.",
)
@click.option(
    "--drop-duplicates",
    is_flag=True,
    help="Of images that are the same to the last byte keep the first: reads all of them twice.",
)
@click.option("--tasks", type=click.IntRange(min=1), help="Shards written at once.  [default: one a core]")
@click.option(
    "--memory-mb",
    type=click.FloatRange(min=1),
    default=256,
    show_default=True,
    help="For the images of one task.",
)
@click.option("--strict", is_flag=True, help="Stop at the first image that cannot be read.")
@click.option("--overwrite", is_flag=True, help="Replace the dataset that is there.")
def build(source: str, dest: str, **options: Any) -> None:
    """Turn images into a dataset of WebDataset shards.

    SOURCE is a folder of class folders or of images, ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar (with --devkit),
    WebDataset tars, Parquet files ("data/train-*.parquet"), or synthetic:?count=4096&classes=10&seed=0. Nothing is
    unpacked. Who stops it and gives the same command again goes on where it was.
    """
    from cluster.sharding import ray_tasks
    from pipeline.contact_sheet import draw_contact_sheet
    from pipeline.images import Changes
    from pipeline.shards import CONTACT_SHEET, DUPLICATES, LEFT_OUT, build
    from pipeline.storage import open_store
    from pipeline.write import Options, Receipt

    store = open_store(dest)
    begin = time.monotonic()
    with ray_tasks(options["tasks"]) as run, BuildProgress() as progress:

        def on_shard(receipt: Receipt, kept: bool) -> None:
            progress.add(receipt.images, receipt.source_bytes, len(receipt.left_out), kept)

        built = build(
            source,
            store,
            Options(
                shard_bytes=int(options["shard_mb"] * 2**20),
                seed=options["seed"],
                check=options["check"],
                changes=Changes(
                    options["shorter_side"], options["longer_side"], options["rgb_jpeg"], options["quality"]
                ),
                strict=options["strict"],
                drop_duplicates=options["drop_duplicates"],
            ),
            devkit=options["devkit"],
            memory=int(options["memory_mb"] * 2**20),
            overwrite=options["overwrite"],
            run=run,
            on_plan=progress.plan,
            on_shard=on_shard,
        )
    for line in built.left_out[:NAMED]:
        console.print(f"left out {line}", style="yellow")
    if len(built.left_out) > NAMED:
        console.print(
            f"… and {len(built.left_out) - NAMED:,} more: {store.describe(LEFT_OUT)}", style="yellow"
        )
    for line in built.warnings:
        console.print(f"note: {line}", style="yellow")
    store.write(CONTACT_SHEET, draw_contact_sheet(open_dataset(dest)))
    manifest = built.manifest
    console.print(
        f"{manifest.samples:,} images in {manifest.shards} shards, {manifest.image_bytes / 2**20:,.1f} MiB, "
        f"{len(manifest.classes)} classes, {len(built.left_out)} left out, in {_duration(time.monotonic() - begin)}"
        f" → {dest}"
    )
    if built.kept:
        console.print(f"{built.kept} of the shards were there from before")
    if built.odd:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in built.odd.items())
        done = "made RGB JPEGs" if options["rgb_jpeg"] else "left as they are: every decoder here reads them"
        console.print(f"not RGB or grey JPEGs: {kinds}; {done}")
    if built.duplicates:
        there = "dropped" if options["drop_duplicates"] else "there; --drop-duplicates leaves them out"
        console.print(f"{len(built.duplicates):,} duplicates are {there}: {store.describe(DUPLICATES)}")
    if built.changed:
        console.print(f"{built.changed:,} images were changed: {manifest.built['bytes']}")
    console.print(f"contact sheet → {store.describe(CONTACT_SHEET)}")


@shards.command()
@click.argument("dest")
@click.option("--to", metavar="ELSEWHERE", help="Where indexes and manifest go, if not beside the tars.")
@click.option("--checksums", is_flag=True, help="Read every byte, so that flipped ones are noticed later.")
@click.option("--skip-damaged", is_flag=True, help="Leave damaged samples out, and name them.")
@click.option("--overwrite", is_flag=True, help="Replace the indexes and manifest that are there.")
def index(dest: str, to: str | None, checksums: bool, skip_damaged: bool, overwrite: bool) -> None:
    """Make a dataset of the WebDataset tars that lie in DEST.

    Only headers are read (and every byte with --checksums), and no tar is written to. Images are .jpg, .jpeg,
    .png and .webp; labels are .cls, or "label", "cls" or "class" in .json.
    """
    from PIL import features

    from pipeline.foreign import find_shards, index_shards
    from pipeline.storage import open_store

    store = open_store(dest)
    names = find_shards(store)
    with progress_bar() as progress:
        task = progress.add_task("shards", total=len(names))
        found = index_shards(
            store,
            names,
            open_store(to or dest),
            checksums=checksums,
            skip_damaged=skip_damaged,
            overwrite=overwrite,
            on_shard=lambda: progress.advance(task),
        )
    for line in found.left_out.named:
        console.print(f"left out {line}", style="yellow")
    if found.left_out.count > len(found.left_out.named):
        console.print(f"… and {found.left_out.count - len(found.left_out.named):,} more", style="yellow")
    if found.webp and not features.check("webp"):
        console.print(f"{found.webp:,} images are WebP, which Pillow here cannot decode", style="yellow")
    manifest = found.manifest
    console.print(
        f"{manifest.samples:,} images in {manifest.shards} shards, {manifest.image_bytes / 2**20:,.1f} MiB, "
        f"{len(manifest.classes)} classes, {found.left_out.count:,} left out, {found.without_label:,} without a "
        f"label → {to or dest}"
    )
    if found.without_image or found.other_files:
        console.print(
            f"passed over: {found.without_image:,} samples without an image, {found.other_files:,} other files"
        )
    if not checksums:
        console.print(NO_CHECKSUMS)


@shards.command()
@click.argument("dest")
@click.option("--grid", type=click.Path(dir_okay=False, writable=True), help="Write a contact sheet (PNG).")
@click.option(
    "--sizes",
    type=click.Path(dir_okay=False, writable=True),
    help="Write histograms of the images' sizes (PNG).",
)
def show(dest: str, grid: str | None, sizes: str | None) -> None:
    """Counts, sizes, classes, and pictures of a dataset."""
    dataset = open_dataset(dest)
    manifest = dataset.manifest
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    of_shards = dataset.shard_bytes / 2**20
    rows = {
        "dataset": dataset.store.url,
        "fingerprint": manifest.fingerprint,
        "samples": f"{manifest.samples:,}",
        "shards": f"{manifest.shards:,}, {of_shards.min():.1f} to {of_shards.max():.1f} MiB",
        "images": f"{manifest.image_bytes / 2**20:,.1f} MiB, {dataset.mean_sample_bytes / 1000:.1f} kB on average",
        "classes": f"{len(manifest.classes)}: {_shorten(manifest.classes)}" if manifest.classes else "none",
        **({"tars": manifest.shards_url} if manifest.shards_url else {}),
        "built": ", ".join(f"{key} {value}" for key, value in manifest.built.items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if not manifest.checksums:
        console.print(NO_CHECKSUMS)
    if grid:
        from pipeline.contact_sheet import draw_contact_sheet

        write_file(grid, draw_contact_sheet(dataset))
        console.print(f"contact sheet → {grid}")
    if sizes:
        from pipeline.histograms import draw_histograms

        write_file(sizes, draw_histograms(dataset))
        console.print(f"histograms → {sizes}")


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


@shards.command()
@click.argument("dest")
@click.option(
    "--repair", is_flag=True, help="Write indexes and manifest again, and name what has to be built again."
)
@click.option("--tasks", type=click.IntRange(min=1), help="Shards read at once.  [default: one a core]")
def verify(dest: str, repair: bool, tasks: int | None) -> None:
    """Read every byte and decode every image. Exit code 1, and what is damaged, if anything is."""
    from cluster.sharding import ray_tasks
    from pipeline.repair import repair as mend
    from pipeline.verify import verify

    total = None if repair else open_dataset(dest).manifest.shards
    with ray_tasks(tasks) as run, progress_bar() as progress:
        task = progress.add_task("shards", total=total)
        if repair:
            repaired = mend(dest, run, on_shard=lambda: progress.advance(task))
        else:
            problems = verify(open_dataset(dest), run, on_shard=lambda: progress.advance(task))
    if repair:
        for line in repaired.mended:
            console.print(f"mended {line}")
        problems = repaired.lost
    dataset = open_dataset(dest)
    for problem in problems:
        console.print(f"damaged {problem}", style="red")
    if problems:
        console.print(f"{len(problems)} problems in {dataset.store.url}")
        sys.exit(1)
    console.print(
        f"{dataset.samples:,} images in {dataset.manifest.shards} shards "
        f"{'are whole' if dataset.manifest.checksums else 'decode'}: {dataset.store.url}"
    )
    if not dataset.manifest.checksums:
        console.print(f"their bytes could not be checked: {NO_CHECKSUMS}")
