"""`maestream shards`: build, index, show and verify datasets."""

import sys
import time
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from cluster.terminal.console import BuildProgress, console, progress_bar, write_file
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.manifest import Manifest
from pipeline.storage.store import Store, open_store
from pipeline.text import plural

if TYPE_CHECKING:
    from pipeline.build.build import BuildResult
    from pipeline.build.shard_writer import BuildOptions

NO_CHECKSUMS = (
    "note: the dataset has no checksums, so corrupted bytes are only detected if an image no longer decodes; "
    "`maestream shards index --checksums --overwrite` adds checksums"
)
MAX_PRINTED = 20  # images that were skipped; the rest is counted
BUILT_LABELS = {"bytes": "image bytes", "build": "build id", "odd": "other formats"}
SIDE = click.IntRange(min=16, max=65_500)
SEED = click.IntRange(min=0, max=2**31 - 1)


@click.group()
def shards() -> None:
    """Build, index, show and verify datasets of WebDataset shards."""


@shards.command()
@click.argument("source")
@click.argument("dest")
@click.option(
    "--shard-mb",
    type=click.FloatRange(min=0.01),
    metavar="MIB",
    default=128,
    show_default=True,
    help="Target size of a shard in MiB.",
)
@click.option("--seed", type=SEED, metavar="N", default=0, show_default=True, help="Seed of the shuffle.")
@click.option(
    "--devkit",
    metavar="FILE",
    help="ILSVRC2012_devkit_t12.tar.gz, which has the labels of ILSVRC2012_img_val.tar.",
)
@click.option(
    "--check",
    type=click.Choice(["decode", "header"]),
    default="decode",
    show_default=True,
    help="How to test each image: decode it, or read only its header.",
)
@click.option(
    "--shorter-side",
    type=SIDE,
    metavar="PIXELS",
    help="Shrink images whose shorter side is larger than this.",
)
@click.option(
    "--longer-side", type=SIDE, metavar="PIXELS", help="Shrink images whose longer side is larger than this."
)
@click.option("--rgb-jpeg", is_flag=True, help="Convert PNG, WebP and CMYK images to RGB JPEGs.")
@click.option(
    "--quality",
    type=click.IntRange(1, 100),
    metavar="N",
    default=90,
    show_default=True,
    help="JPEG quality of shrunk and converted images. All others are copied unchanged.",
)
@click.option(
    "--drop-duplicates",
    is_flag=True,
    help="Of images with identical bytes, keep only the first. Reads all images twice.",
)
@click.option(
    "--tasks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of shards to write in parallel.  [default: number of CPU cores]",
)
@click.option(
    "--memory-mb",
    type=click.FloatRange(min=1),
    metavar="MIB",
    default=256,
    show_default=True,
    help="Memory for the images of each parallel task in MiB.",
)
@click.option(
    "--strict", is_flag=True, help="Stop at the first image that cannot be read, instead of leaving it out."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing dataset in DEST.")
def build(source: str, dest: str, **options: Any) -> None:
    """Build a dataset of WebDataset shards from images.

    DEST is the folder of the dataset. SOURCE is one of:

    \b
      a folder of class folders, or of images
      ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar with --devkit
      a WebDataset tar, or a folder of them
      Parquet files, for example "data/train-*.parquet"
      synthetic images, for example "synthetic:?count=4096&classes=10&seed=0"

    Archives are read without unpacking them. Run the same command again to resume an interrupted build.
    """
    from cluster.runtime.task_pool import task_pool
    from pipeline.build.build import CONTACT_SHEET, build
    from pipeline.build.shard_writer import BuildOptions, Receipt
    from pipeline.dataset.image_check import Conversion
    from pipeline.loading.contact_sheet import draw_contact_sheet

    store = open_store(dest)
    build_options = BuildOptions(
        shard_bytes=int(options["shard_mb"] * 2**20),
        seed=options["seed"],
        check=options["check"],
        conversion=Conversion(
            options["shorter_side"], options["longer_side"], options["rgb_jpeg"], options["quality"]
        ),
        strict=options["strict"],
        drop_duplicates=options["drop_duplicates"],
    )
    started = time.monotonic()
    with task_pool(options["tasks"]) as run, BuildProgress() as progress:

        def on_shard(receipt: Receipt, kept: bool) -> None:
            progress.add(receipt.images, receipt.source_bytes, len(receipt.left_out), kept)

        built = build(
            source,
            store,
            build_options,
            devkit=options["devkit"],
            memory=int(options["memory_mb"] * 2**20),
            overwrite=options["overwrite"],
            run=run,
            on_plan=progress.start,
            on_shard=on_shard,
        )
    _print_left_out(built, store)
    store.write(CONTACT_SHEET, draw_contact_sheet(open_dataset(dest)))
    console.print(
        f"wrote {_summary(built.manifest)}, {len(built.skipped):,} skipped, to {dest} in "
        f"{_duration(time.monotonic() - started)}"
    )
    _print_notes(built, store, build_options)
    console.print(f"wrote a contact sheet to {store.describe(CONTACT_SHEET)}")


def _print_left_out(built: "BuildResult", store: Store) -> None:
    """Print the images that were skipped, and warnings."""
    from pipeline.build.build import LEFT_OUT

    for line in built.skipped[:MAX_PRINTED]:
        console.print(f"skipped {line}", style="yellow")
    if len(built.skipped) > MAX_PRINTED:
        console.print(
            f"… and {len(built.skipped) - MAX_PRINTED:,} more, listed in {store.describe(LEFT_OUT)}",
            style="yellow",
        )
    for line in built.warnings:
        console.print(f"note: {line}", style="yellow")


def _print_notes(built: "BuildResult", store: Store, options: "BuildOptions") -> None:
    """Print what else is worth knowing about a build: resumed shards, unusual formats, duplicates, changed images."""
    from pipeline.build.build import DUPLICATES

    if built.kept:
        console.print(f"{plural(built.kept, 'shard')} already existed from an interrupted build")
    if built.odd:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in built.odd.items())
        action = "converted to RGB JPEGs" if options.conversion.rgb_jpeg else "kept: all decoders read them"
        console.print(f"images other than RGB or grey JPEGs: {kinds}; {action}")
    if built.duplicates:
        action = "skipped" if options.drop_duplicates else "kept (--drop-duplicates skips them)"
        count = plural(len(built.duplicates), "duplicate")
        console.print(f"{count} {action}, listed in {store.describe(DUPLICATES)}")
    if built.changed:
        console.print(f"{plural(built.changed, 'image')} changed: {built.manifest.built['bytes']}")


@shards.command()
@click.argument("dest", metavar="FOLDER")
@click.option(
    "--to", metavar="FOLDER", help="Folder for the index and manifest.  [default: the folder of the tars]"
)
@click.option(
    "--checksums",
    is_flag=True,
    help="Read every byte and store checksums, so that corruption is detected later.",
)
@click.option("--skip-damaged", is_flag=True, help="Skip damaged samples and list them, instead of stopping.")
@click.option("--overwrite", is_flag=True, help="Replace an existing index and manifest.")
def index(dest: str, to: str | None, checksums: bool, skip_damaged: bool, overwrite: bool) -> None:
    """Make a dataset of existing WebDataset tars.

    Writes an index and a manifest for all tars in FOLDER, and leaves the tars as they are. Only the headers in the
    tars are read, unless --checksums is given. Images are .jpg, .jpeg, .png and .webp files; labels are .cls files, or the
    key "label", "cls" or "class" of .json files.
    """
    from PIL import features

    from pipeline.dataset.index import find_shards, index_shards

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
    for line in found.skipped.listed:
        console.print(f"skipped {line}", style="yellow")
    if found.skipped.count > len(found.skipped.listed):
        console.print(f"… and {found.skipped.count - len(found.skipped.listed):,} more", style="yellow")
    if found.webp and not features.check("webp"):
        console.print(
            f"{plural(found.webp, 'image')} in WebP format, which the installed Pillow cannot decode",
            style="yellow",
        )
    manifest = found.manifest
    console.print(
        f"indexed {_summary(manifest)}, {found.skipped.count:,} skipped, {found.without_label:,} without a label; wrote "
        f"the index and manifest to {to or dest}"
    )
    if found.without_image or found.other_files:
        console.print(
            f"ignored {plural(found.without_image, 'sample')} without an image, {plural(found.other_files, 'other file')}"
        )
    if not checksums:
        console.print(NO_CHECKSUMS)


@shards.command()
@click.argument("dest", metavar="DATASET")
@click.option(
    "--grid",
    type=click.Path(dir_okay=False, writable=True),
    help="Write a contact sheet of images to this PNG file.",
)
@click.option(
    "--sizes",
    type=click.Path(dir_okay=False, writable=True),
    help="Write histograms of the image sizes to this PNG file.",
)
def show(dest: str, grid: str | None, sizes: str | None) -> None:
    """Show counts, sizes and classes of a dataset."""
    dataset = open_dataset(dest)
    manifest = dataset.manifest
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    shard_mib = dataset.shard_bytes / 2**20
    rows = {
        "dataset": dataset.store.url,
        "fingerprint": manifest.fingerprint,
        "samples": f"{manifest.samples:,}",
        "shards": f"{manifest.shards:,}, {shard_mib.min():.1f} to {shard_mib.max():.1f} MiB",
        "images": f"{manifest.image_bytes / 2**20:,.1f} MiB, {dataset.mean_sample_bytes / 1000:.1f} kB on average",
        "classes": f"{len(manifest.classes)}: {_shorten(manifest.classes)}" if manifest.classes else "none",
        **({"tars": manifest.shards_url} if manifest.shards_url else {}),
        "built": _format_built(manifest.built),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if not manifest.checksums:
        console.print(NO_CHECKSUMS)
    if grid:
        from pipeline.loading.contact_sheet import draw_contact_sheet

        write_file(grid, draw_contact_sheet(dataset))
        console.print(f"wrote a contact sheet to {grid}")
    if sizes:
        from pipeline.dataset.histograms import draw_histograms

        write_file(sizes, draw_histograms(dataset))
        console.print(f"wrote histograms to {sizes}")


def _summary(manifest: Manifest) -> str:
    classes = plural(len(manifest.classes), "class", "classes")
    size = f"{manifest.image_bytes / 2**20:,.1f} MiB"
    return f"{plural(manifest.samples, 'image')} in {plural(manifest.shards, 'shard')}, {size}, {classes}"


def _format_built(built: dict[str, Any]) -> str:
    """Return how a dataset was made, as in its manifest, as one line."""
    texts = []
    for key, value in built.items():
        if isinstance(value, dict):
            value = " + ".join(f"{count:,} {kind}" for kind, count in value.items()) or "none"
        texts.append(f"{BUILT_LABELS.get(key, key.replace('_', ' '))} {value}")
    return ", ".join(texts)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


@shards.command()
@click.argument("dest", metavar="DATASET")
@click.option(
    "--repair",
    is_flag=True,
    help="Rewrite damaged indexes and manifests from the tars. Damaged tars have to be built again.",
)
@click.option(
    "--tasks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of shards to read in parallel.  [default: number of CPU cores]",
)
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
