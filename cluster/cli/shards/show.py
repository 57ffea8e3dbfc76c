"""`maestream shards show`."""

from typing import Any

import click
import numpy as np
from rich.table import Table

from cluster.cli.options import anonymous_option
from cluster.cli.shards.common import NO_CHECKSUMS, labels_summary
from cluster.terminal.console import console, write_file
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.statistics import format_values, read_statistics
from pipeline.errors import UserError
from pipeline.text import plural

BUILT_LABELS = {"bytes": "image bytes", "build": "build id", "odd": "other formats"}


@click.command()
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
@anonymous_option("dest", "DATASET")
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
        **_pixels(dataset),
        **_labels(manifest),
        **({"tars": manifest.shards_url} if manifest.shards_url else {}),
        **({"parts": _format_parts(dataset)} if manifest.parts else {}),
        "built": _format_built(manifest.built),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if not manifest.checksums:
        console.print(NO_CHECKSUMS)
    if grid:
        from pipeline.pictures.contact_sheet import draw_contact_sheet

        write_file(grid, draw_contact_sheet(dataset))
        console.print(f"wrote a contact sheet to {grid}")
    if sizes:
        from pipeline.dataset.histograms import draw_histograms

        write_file(sizes, draw_histograms(dataset))
        console.print(f"wrote histograms to {sizes}")


def _format_parts(dataset: Dataset) -> str:
    """Return the parts of a dataset, one line each: samples, weight and where the tars are."""
    counts = np.diff(dataset.part_starts).tolist()
    return "\n".join(
        f"{part.name}: {plural(count, 'sample')}, {part.weight} × per epoch, in {part.url or dataset.store.url}"
        for part, count in zip(dataset.parts, counts, strict=True)
    )


def _labels(manifest: Manifest) -> dict[str, str]:
    if manifest.labels == "numbers":
        return {"labels": labels_summary(manifest)}
    classes = f"{len(manifest.classes)}: {_shorten(manifest.classes)}" if manifest.classes else "none"
    return {
        "classes": classes,
        **({"labels": "any number of classes for each image"} if manifest.labels == "classes" else {}),
    }


def _pixels(dataset: Dataset) -> dict[str, str]:
    """Return the rows of the table on the images' pixels and their statistics."""
    pixels = dataset.manifest.pixels
    bits = f", {pixels.bits} bits" if pixels.dtype == "uint16" else ""
    rows = {"pixels": f"{plural(pixels.channels, 'channel')}, {pixels.dtype}{bits}"}
    try:
        found = read_statistics(dataset)
    except UserError:
        return rows
    mean, std = format_values(found.mean), format_values(found.std)
    return rows | {"statistics": f"mean {mean}, standard deviation {std}, of {found.source}"}


def _format_built(built: dict[str, Any]) -> str:
    """Return how a dataset was made, as in its manifest, as one line."""
    texts = []
    for key, value in built.items():
        if isinstance(value, dict):
            value = " + ".join(f"{count:,} {kind}" for kind, count in value.items()) or "none"
        texts.append(f"{BUILT_LABELS.get(key, key.replace('_', ' '))} {value}")
    return ", ".join(texts)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
