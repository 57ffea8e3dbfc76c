"""`maestream shards index`."""

from typing import Any

import click

from cluster.cli.options import anonymous_option
from cluster.cli.shards.common import NO_CHECKSUMS, bits_option, fields_options, summary
from cluster.terminal.console import console, progress_bar
from pipeline.dataset.fields import parse_fields
from pipeline.storage.store import open_store
from pipeline.text import plural


@click.command()
@click.argument("dest", metavar="FOLDER")
@click.option(
    "--to", metavar="FOLDER", help="Folder for the index and manifest.  [default: the folder of the tars]"
)
@click.option(
    "--checksums",
    is_flag=True,
    help="Read every byte and store checksums, so that corruption is detected later.",
)
@fields_options
@bits_option
@click.option(
    "--skip-damaged", is_flag=True, help="Skip damaged samples and tars, and list them, instead of stopping."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing index and manifest.")
@anonymous_option("dest", "the tars in FOLDER")
def index(
    dest: str,
    to: str | None,
    checksums: bool,
    bits: int | None,
    skip_damaged: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Make a dataset of existing WebDataset tars.

    Writes an index and a manifest for all tars in FOLDER, and leaves the tars as they are. Only the headers in the
    tars are read, unless --checksums is given. By default images are the files with the extension of an image, and labels are
    .cls files, or the field "label", "cls" or "class" of .json files.
    """
    from pipeline.dataset.index import find_shards, index_shards

    store = open_store(dest)
    fields = parse_fields(**options)
    names = find_shards(store, skip_damaged)
    with progress_bar() as progress:
        task = progress.add_task("shards", total=len(names))
        found = index_shards(
            store,
            names,
            open_store(to or dest),
            checksums=checksums,
            bits=bits,
            skip_damaged=skip_damaged,
            fields=fields,
            overwrite=overwrite,
            on_shard=lambda: progress.advance(task),
        )
    for line in found.skipped.listed:
        console.print(f"skipped {line}", style="yellow")
    if found.skipped.count > len(found.skipped.listed):
        console.print(f"… and {found.skipped.count - len(found.skipped.listed):,} more", style="yellow")
    manifest = found.manifest
    console.print(
        f"indexed {summary(manifest)}, {found.skipped.count:,} skipped, {found.without_label:,} without a label; wrote "
        f"the index and manifest to {to or dest}"
    )
    if found.without_image or found.other_files:
        console.print(
            f"ignored {plural(found.without_image, 'sample')} without an image, {plural(found.other_files, 'other file')}"
        )
    for line in found.notes:
        console.print(f"note: {line}", style="yellow")
    if not checksums:
        console.print(NO_CHECKSUMS)
