"""What several commands for datasets print."""

from collections.abc import Callable

import click

from pipeline.dataset.manifest import Manifest
from pipeline.text import plural

NO_CHECKSUMS = (
    "note: the dataset has no checksums, so corrupted bytes are only detected if an image no longer decodes; "
    "`maestream shards index --checksums --overwrite` adds checksums"
)

bits_option = click.option(
    "--bits",
    type=click.IntRange(8, 16),
    metavar="N",
    help="Significant bits of 16-bit images: 12 if their values are 0 to 4095.  [default: what their files say, or their values "
    "use]",
)


def summary(manifest: Manifest) -> str:
    """Size and labels of a dataset: "512 images in 1 shard, 26.2 MiB, 10 classes"."""
    size = f"{manifest.image_bytes / 2**20:,.1f} MiB"
    return f"{plural(manifest.samples, 'image')} in {plural(manifest.shards, 'shard')}, {size}, {labels_summary(manifest)}"


def labels_summary(manifest: Manifest) -> str:
    """What labels are: "10 classes", "10 classes, any number for each image", "2 numbers for each image"."""
    if manifest.labels == "numbers":
        return f"{plural(len(manifest.classes), 'number')} to predict for each image"
    several = ", any number for each image" if manifest.labels == "classes" else ""
    return f"{plural(len(manifest.classes), 'class', 'classes')}{several}"


def fields_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose fields: the arguments of `pipeline.dataset.fields.parse_fields`, in its order."""
    for option in reversed(
        (
            click.option(
                "--image",
                metavar="FIELD",
                help="Which image of a sample to use: an extension such as rgb.jpg, or a column.",
            ),
            click.option(
                "--label",
                metavar="FIELD",
                help="Where labels are: an extension such as cls, a field of .json files such as json:path.to.field, or a "
                "column.",
            ),
            click.option(
                "--label-kind",
                "kind",
                type=click.Choice(["class", "classes", "numbers"]),
                help="What labels are: one class, several classes, or numbers to predict.  [default: decided from all labels]",
            ),
            click.option(
                "--keep-json",
                "keep",
                metavar="FIELDS",
                help="Fields of .json files, or columns, to keep as columns of the index: score,NAME=path.to.field.",
            ),
            click.option(
                "--split-at",
                type=click.Choice(["first-dot", "last-dot"]),
                default="first-dot",
                show_default=True,
                help="Where the name of a sample ends in the file names of a tar: WebDataset's rule, or for names with dots.",
            ),
        )
    ):
        command = option(command)
    return command
