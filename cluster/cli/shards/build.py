"""`maestream shards build`."""

import time
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.options import NumberRange, anonymous_option, seed_option, tasks_option
from cluster.cli.shards.common import bits_option, fields_options, summary
from cluster.terminal.console import BuildProgress, console
from pipeline.dataset.dataset import open_dataset
from pipeline.storage.store import Store, open_store
from pipeline.text import plural

if TYPE_CHECKING:
    from pipeline.build.build import BuildResult
    from pipeline.build.shard_writer import BuildOptions

MAX_PRINTED = 20  # images that were skipped; the rest is counted
SIDE = click.IntRange(min=16, max=65_500)


@click.command()
@click.argument("source")
@click.argument("dest")
@click.option(
    "--shard-mb",
    type=NumberRange(min=0.01),
    metavar="MIB",
    default=128,
    show_default=True,
    help="Target size of a shard in MiB.",
)
@seed_option("Seed of the shuffle.")
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
@click.option(
    "--rgb-jpeg",
    is_flag=True,
    help="Convert CMYK JPEGs and images of all other formats to RGB or grey JPEGs.",
)
@bits_option
@click.option(
    "--allow-truncated",
    is_flag=True,
    help="Keep JPEGs and PNGs whose end is missing. The missing part becomes grey or black.",
)
@click.option(
    "--page",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    show_default=True,
    help="Which page of TIFFs to use. Pages other than the first are written as TIFFs of their own.",
)
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
@fields_options
@click.option(
    "--splits",
    type=click.Choice(["classes", "merge"]),
    help="What train, val and test in one folder are: names of classes, or parts of one dataset. Refused by default.",
)
@click.option(
    "--allow-empty-classes",
    is_flag=True,
    help="Make class folders without images classes, too, as ImageFolder does with allow_empty.",
)
@tasks_option("shards to write in parallel")
@click.option(
    "--memory-mb",
    type=NumberRange(min=1),
    metavar="MIB",
    default=256,
    show_default=True,
    help="Memory for the images of each parallel task in MiB.",
)
@click.option(
    "--strict", is_flag=True, help="Stop at the first image that cannot be read, instead of leaving it out."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing dataset in DEST.")
@anonymous_option("source", "SOURCE")
def build(source: str, dest: str, **options: Any) -> None:
    """Build a dataset of WebDataset shards from images.

    DEST is the folder of the dataset. SOURCE is one of:

    \b
      a folder of class folders, or of images, perhaps with metadata.csv
      ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar with --devkit
      a WebDataset tar, or a folder of them
      Parquet files, for example "data/train-*.parquet"
      synthetic images, for example "synthetic:?count=4096&classes=10&seed=0"

    Archives are read without unpacking them. Run the same command again to resume an interrupted build.
    """
    from cluster.runtime.task_pool import task_pool
    from pipeline.build.build import CONTACT_SHEET, build
    from pipeline.build.image_table import SourceOptions
    from pipeline.build.shard_writer import BuildOptions, Receipt
    from pipeline.dataset.fields import parse_fields
    from pipeline.dataset.image_check import Conversion
    from pipeline.pictures.contact_sheet import draw_contact_sheet

    store = open_store(dest)
    store.check_writable()
    build_options = BuildOptions(
        shard_bytes=int(options["shard_mb"] * 2**20),
        seed=options["seed"],
        check=options["check"],
        conversion=Conversion(
            options["shorter_side"],
            options["longer_side"],
            options["rgb_jpeg"],
            options["quality"],
            options["bits"],
            options["allow_truncated"],
            options["page"],
        ),
        strict=options["strict"],
        drop_duplicates=options["drop_duplicates"],
        source=SourceOptions(
            options["splits"],
            options["allow_empty_classes"],
            parse_fields(*(options[name] for name in ("image", "label", "kind", "keep", "split_at"))),
        ),
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
            on_source=_print_source_notes,
            on_plan=progress.start,
            on_shard=on_shard,
        )
    _print_left_out(built, store)
    store.write(CONTACT_SHEET, draw_contact_sheet(open_dataset(dest)))
    console.print(
        f"wrote {summary(built.manifest)}, {len(built.skipped):,} skipped, to {dest} in "
        f"{_duration(time.monotonic() - started)}"
    )
    _print_notes(built, store, build_options)
    console.print(f"wrote a contact sheet to {store.describe(CONTACT_SHEET)}")


def _print_left_out(built: "BuildResult", store: Store) -> None:
    """Print the images that were skipped, and the classes that this leaves without images."""
    from pipeline.build.build import LEFT_OUT

    for line in built.skipped[:MAX_PRINTED]:
        console.print(f"skipped {line}", style="yellow")
    if len(built.skipped) > MAX_PRINTED:
        console.print(
            f"… and {len(built.skipped) - MAX_PRINTED:,} more, listed in {store.describe(LEFT_OUT)}",
            style="yellow",
        )
    if built.lost_classes:
        console.print(
            f"{plural(len(built.lost_classes), 'class', 'classes')} without an image, because all of theirs were left out: "
            f"{', '.join(built.lost_classes[:5])}{', …' if len(built.lost_classes) > 5 else ''}. They keep their numbers; to "
            "build without them, remove their images from the source",
            style="yellow",
        )


def _print_source_notes(notes: tuple[str, ...]) -> None:
    """Print the notes about a source."""
    for line in notes:
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
    if built.bits_note:
        console.print(f"note: {built.bits_note}", style="yellow")
    if built.duplicates:
        action = "skipped" if options.drop_duplicates else "kept (--drop-duplicates skips them)"
        count = plural(len(built.duplicates), "duplicate")
        console.print(f"{count} {action}, listed in {store.describe(DUPLICATES)}")
    if built.changed:
        console.print(f"{plural(built.changed, 'image')} changed: {built.manifest.built['bytes']}")


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
