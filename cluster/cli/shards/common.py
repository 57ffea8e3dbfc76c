"""What several commands for datasets print."""

from pipeline.dataset.manifest import Manifest
from pipeline.text import plural

NO_CHECKSUMS = (
    "note: the dataset has no checksums, so corrupted bytes are only detected if an image no longer decodes; "
    "`maestream shards index --checksums --overwrite` adds checksums"
)


def summary(manifest: Manifest) -> str:
    """Size and classes of a dataset: "512 images in 1 shard, 26.2 MiB, 10 classes"."""
    classes = plural(len(manifest.classes), "class", "classes")
    size = f"{manifest.image_bytes / 2**20:,.1f} MiB"
    return f"{plural(manifest.samples, 'image')} in {plural(manifest.shards, 'shard')}, {size}, {classes}"
