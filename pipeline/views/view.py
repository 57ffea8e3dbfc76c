"""A view: some samples of a dataset, as a dataset of its own. Its tars stay where they are.

First the indexes of the source are read, and the rows that are chosen are kept in temporary files on the local disk. Only
if any are left are the indexes of the view written, and the manifest last. So a condition that is wrong changes nothing.
"""

import hashlib
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.fields import Fields
from pipeline.dataset.index import built_fields, fields_of
from pipeline.dataset.manifest import (
    NO_LABEL,
    SHARDS_SCHEMA,
    Manifest,
    Part,
    content_digest,
    write_dataset,
)
from pipeline.errors import UserError
from pipeline.parallel import map_ahead
from pipeline.storage.parquet import read_parquet, to_parquet
from pipeline.storage.store import TEMPORARY, Store, open_store
from pipeline.text import plural
from pipeline.views.condition import Condition
from pipeline.views.destination import IndexWriter, check_destination, parts_elsewhere

THREADS = 16  # more than cores, because they mostly wait for small reads
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Selection:
    """Which samples a view has: those for which `where` holds, without `drop`, and of these a fraction.

    A sample's rank among them is a hash of the seed and its key. A fraction takes the first by rank, so a smaller
    fraction with the same seed, and otherwise the same selection, is a part of a larger one.
    """

    where: str | None = None  # see `pipeline.views.condition`; None: all
    drop: Collection[str] = ()  # keys
    fraction: float | None = None  # above 0, at most 1
    seed: int = 0

    def built(self) -> dict[str, Any]:
        """For the manifest."""
        built: dict[str, Any] = {}
        if self.where is not None:
            built["where"] = self.where
        if self.drop:
            built["drop"] = len(self.drop)
        if self.fraction is not None:
            built |= {"fraction": self.fraction, "seed": self.seed}
        return built


@dataclass
class ViewResult:
    """The manifest that was written, and counts."""

    manifest: Manifest
    bytes: int  # written
    unknown: list[str]  # keys to drop that the source does not have
    classes: int  # classes with at least one sample


def make_view(
    source: Dataset,
    to: Store,
    selection: Selection,
    overwrite: bool = False,
    on_shard: Callable[[], None] = lambda: None,
) -> ViewResult:
    """Write a view of a dataset to `to`: indexes, table of shards and manifest.

    Classes keep their numbers, so models that were trained on the source can be evaluated on the view.

    Args:
        overwrite: whether to replace a view that is there.
        on_shard: called after each shard of the source is read.

    Raises UserError if the selection is not valid, or selects nothing; then nothing is written.
    """
    check_destination(to, [source], overwrite)
    condition = Condition(selection.where) if selection.where is not None else None
    drop, found = set(selection.drop), set[str]()
    ranks: list[npt.NDArray[np.uint64]] = []  # of the rows that are kept, for each shard
    shards = range(source.manifest.shards)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        spool = open_store(folder)
        for shard, index in enumerate(
            map_ahead(lambda s: source.read_index_table(s, kept=True), shards, THREADS)
        ):
            mask = condition.mask(columns(source, shard, index)) if condition else np.ones(len(index), bool)
            if drop:
                keys = index["key"].to_pylist()
                found |= drop.intersection(keys)
                mask &= np.array([key not in drop for key in keys], bool)
            rows = index.filter(pa.array(mask))
            spool.write(f"{shard}.parquet", to_parquet(rows))
            ranks.append(_ranks(rows["key"].to_pylist(), selection.seed))
            on_shard()
        chosen = _choose(source, ranks, selection)
        writer = IndexWriter(to)
        writer.begin()

        def write_index(shard: int) -> dict[str, Any] | None:
            if not chosen[shard].any():
                return None
            index = read_parquet(spool.read(f"{shard}.parquet")).filter(pa.array(chosen[shard]))
            writer.write(source.shard_name(shard), index)
            return {
                "name": source.shard_name(shard),
                "samples": len(index),
                "bytes": int(source.shard_bytes[shard]),
                "sha256": source.shard_sha256[shard].as_py(),
                "content": content_digest(index),
                "image_bytes": sum(index["size"].to_pylist()),
                "labels": _numbers(index),
            }

        rows_written = [row for row in map_ahead(write_index, shards, THREADS) if row]
    manifest = write_dataset(
        to,
        pa.Table.from_pylist(
            [{n: r[n] for n in SHARDS_SCHEMA.names} for r in rows_written], schema=SHARDS_SCHEMA
        ),
        sum(row["image_bytes"] for row in rows_written),
        source.manifest.classes,
        {"view": source.store.url, **selection.built(), **built_fields(*fields_of_tars(source))},
        checksums=source.manifest.checksums,
        shards_url=None if source.manifest.parts else source.shard_store.url,
        parts=_parts(source, chosen) if source.manifest.parts else (),
        labels=source.manifest.labels,
        pixels=source.manifest.pixels,
    )
    classes = set[int]().union(*(row["labels"] for row in rows_written))
    return ViewResult(manifest, writer.end(), sorted(drop - found), len(classes))


def fields_of_tars(dataset: Dataset) -> tuple[Fields, dict[str, str]]:
    """The fields that were chosen when the tars of a dataset were indexed, and the types of kept columns."""
    built = dataset.manifest.built
    return fields_of(built if {"indexed", "view"} & built.keys() else {})


def _parts(source: Dataset, chosen: list[Mask]) -> list[Part]:
    """The parts of a view of a dataset with parts: their shards that have samples in the view."""
    ends = np.cumsum([part.shards for part in source.parts]).tolist()
    counts = [
        sum(bool(mask.any()) for mask in chosen[end - part.shards : end])
        for part, end in zip(source.parts, ends, strict=True)
    ]
    parts = zip(parts_elsewhere(source), counts, strict=True)
    return [part.model_copy(update={"shards": count}) for part, count in parts if count]


def _choose(source: Dataset, ranks: list[npt.NDArray[np.uint64]], selection: Selection) -> list[Mask]:
    """Which of the kept rows of each shard the view has. UserError if there are none."""
    count = sum(map(len, ranks))
    what = f"{source.store.url}: none of {plural(source.samples, 'sample')} is selected"
    if not count:
        raise UserError(f"{what}: check --where and --drop")
    if selection.fraction is None:
        return [np.ones(len(part), bool) for part in ranks]
    wanted = round(selection.fraction * count)
    if not wanted:
        raise UserError(
            f"{what}: a fraction of {selection.fraction:g} of {plural(count, 'sample')} is less than one half"
        )
    mask = np.zeros(count, bool)
    mask[np.argsort(np.concatenate(ranks), kind="stable")[:wanted]] = True
    return np.split(mask, np.cumsum([len(part) for part in ranks])[:-1])


def _ranks(keys: list[str], seed: int) -> npt.NDArray[np.uint64]:
    """The rank of each key: uint64[keys]."""
    salt = seed.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8, salt=salt).digest() for key in keys)
    return np.frombuffer(digests, "<u8")


def columns(source: Dataset, shard: int, index: pa.Table) -> pa.Table:
    """The columns that a condition may use, of one shard.

    key, size (bytes), width, height (pixels), shard (the tar's name), label (the class name), label_number (its number), and
    columns that `--keep-json` put into the index.
    """
    own = {
        "key": index["key"],
        "label": _names(source, index["label"]),
        "label_number": _numbers_of(source, index["label"]),
        "width": index["width"],
        "height": index["height"],
        "size": index["size"],
        "shard": pa.array([source.shard_name(shard)] * len(index), pa.string()),
    }
    hidden = {"offset", "crc32c"}
    kept = {name: index[name] for name in index.column_names if name not in own and name not in hidden}
    return pa.table(own | kept)


def _numbers_of(source: Dataset, labels: pa.ChunkedArray) -> pa.Array:
    """Class numbers, or numbers to predict: not as a list if each sample has one."""
    values = _without_none(labels)
    if source.manifest.labels == "numbers" and len(source.manifest.classes) == 1:
        return pc.list_element(values, 0)
    return values


def _without_none(labels: pa.ChunkedArray) -> pa.Array:
    """int32 class numbers with NULL for no label."""
    values = labels.combine_chunks()
    if not pa.types.is_integer(values.type):
        return values
    numbers = values.to_numpy()
    return pa.array(numbers, pa.int32(), mask=numbers == NO_LABEL)


def _names(source: Dataset, labels: pa.ChunkedArray) -> pa.Array:
    """The class name of each label. A list of names if a sample may have several; numbers to predict stay numbers."""
    names = pa.array(source.manifest.classes, pa.string())
    values = _without_none(labels)
    if source.manifest.labels == "numbers":
        return _numbers_of(source, labels)
    if source.manifest.labels == "classes":
        taken = names.take(values.flatten())
        return pa.ListArray.from_arrays(values.offsets, taken, mask=values.is_null())
    return names.take(values) if len(names) else pa.nulls(len(values), pa.string())


def _numbers(index: pa.Table) -> set[int]:
    """The class numbers in an index."""
    values = index["label"].combine_chunks()
    if pa.types.is_list(values.type):
        values = values.flatten()
    return {int(n) for n in values.unique().to_pylist() if n is not None and n != NO_LABEL}
