"""Where a dataset without tars of its own is written, and how."""

import os
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import BUILDING, MANIFEST, SHARDS, Part, index_name
from pipeline.errors import UserError
from pipeline.storage.parquet import to_parquet
from pipeline.storage.store import Store, open_store


def check_destination(to: Store, sources: list[Dataset], overwrite: bool) -> None:
    """UserError if a dataset made of `sources` cannot be written to `to`. Writes nothing."""
    for source in sources:
        tars = {part.url for part in source.parts if part.url}
        for place, what in (
            (source.store, "the source"),
            *((open_store(url), "the folder of the tars") for url in tars),
        ):
            if _is_inside(to, place):
                raise UserError(f"{to.url} is {what}, or in it: choose a destination outside of {place.url}")
    if to.exists(BUILDING):
        raise UserError(f"{to.url} contains an unfinished build: choose another destination")
    if not to.exists(MANIFEST):
        return
    if not overwrite:
        raise UserError(f"{to.url} already has a dataset: add --overwrite, or choose another destination")
    if open_dataset(to.url).manifest.has_tars:
        raise UserError(
            f"{to.url} is a dataset with tars of its own, and --overwrite would leave them without a manifest: choose "
            "another destination"
        )


def _is_inside(inner: Store, outer: Store) -> bool:
    """Whether a folder is another one, or below it."""
    if inner.is_local and outer.is_local:
        a, b = os.path.realpath(inner.root), os.path.realpath(outer.root)
        return a == b or a.startswith(b.rstrip("/") + "/")
    return inner.url == outer.url or inner.url.startswith(outer.url + "/")


def parts_elsewhere(source: Dataset) -> list[Part]:
    """The parts of a dataset, as a dataset in another folder needs them: all with the URL of their tars."""
    return [part.model_copy(update={"url": part.url or source.store.url}) for part in source.parts]


@dataclass
class IndexWriter:
    """Writes the indexes of a new dataset, and counts the bytes."""

    to: Store
    bytes: int = 0
    old: set[str] = field(default_factory=set)  # files of the dataset that was there before

    def begin(self) -> None:
        """Make room: from now on there is no dataset until the manifest is written."""
        self.old = set(self.to.names("index"))
        if self.to.exists(MANIFEST):
            self.to.remove([MANIFEST])

    def write(self, shard_name: str, index: pa.Table) -> None:
        name, data = index_name(shard_name), to_parquet(index)
        self.to.write(name, data)
        self.bytes += len(data)
        self.old.discard(name)

    def end(self, table: str = SHARDS) -> int:
        """Remove what is left of the old dataset. Returns the number of bytes that were written, with manifest and table."""
        if self.old:
            self.to.remove(sorted(self.old))
        return self.bytes + self.to.size(MANIFEST) + self.to.size(table)
