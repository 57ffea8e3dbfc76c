"""Open a dataset, and look up where its samples are.

Opening takes the same time for any number of samples, because the index of a shard is read when it is first needed. Of
the table of shards only names, sample counts and sizes stay in memory, about 50 bytes per shard; the digests are read on
request.
"""

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.arrays import Ints
from pipeline.dataset.manifest import (
    BUILDING,
    FORMAT_VERSION,
    INDEX_ROW,
    INDEX_SCHEMA,
    MANIFEST,
    NO_LABEL,
    SHARDS_SCHEMA,
    Manifest,
    Part,
    fingerprint,
    index_name,
    index_row,
    index_schema,
    read_file,
    read_shard_table,
)
from pipeline.errors import UserError
from pipeline.storage.mounts import mounts_url, open_tars
from pipeline.storage.parquet import parse_parquet, parse_parquet_column, read_parquet
from pipeline.storage.store import Store, open_store

TRAINING_COLUMNS = ["name", "samples", "bytes"]  # columns of SHARDS_SCHEMA that stay in memory
SMALL_GAP_BYTES = 16 << 10  # bytes between two samples that cost less than another request
INDEX_BYTES = 128 << 20  # memory for the most recently used indexes: about 450 shards of 10 000 samples


@dataclass(frozen=True)
class Located:
    """Where samples are: the number of each sample's shard (int64[n]) and its index row (`Dataset.row_type`[n])."""

    shard: Ints
    row: npt.NDArray[np.void]

    @property
    def offset(self) -> Ints:
        return self.row["offset"]

    @property
    def size(self) -> Ints:
        return self.row["size"].astype(np.int64)

    @property
    def label(self) -> Ints:
        return self.row["label"].astype(np.int64)

    @property
    def width(self) -> Ints:
        return self.row["width"].astype(np.int64)

    @property
    def height(self) -> Ints:
        return self.row["height"].astype(np.int64)

    @property
    def crc32c(self) -> Ints:
        return self.row["crc32c"].astype(np.int64)


class Dataset:
    """An opened dataset. Thread-safe."""

    def __init__(
        self, store: Store, shard_store: Store, manifest: Manifest, shards: pa.Table, identity: str
    ) -> None:
        self.store = store  # of the manifest, the table of shards and the indexes
        self.shard_store = shard_store  # of the tars
        self.manifest = manifest
        # Digest of the files manifest.json and shards.parquet. Unlike the fingerprint, it differs between two builds of the
        # same data.
        self.identity = identity
        self.shard_names: pa.ChunkedArray = shards["name"]
        self.shard_samples: Ints = shards["samples"].to_numpy()
        self.shard_bytes: Ints = shards["bytes"].to_numpy()
        # int64[shards + 1]: the id of each shard's first sample, and the number of samples.
        self.shard_starts: Ints = np.concatenate([[0], np.cumsum(self.shard_samples)])
        self.row_type = index_row(manifest.labels, len(manifest.classes))
        self.shard_keys = functools.lru_cache(maxsize=16)(self._read_keys)
        self._indexes: OrderedDict[int, npt.NDArray[np.void]] = OrderedDict()  # shard → row_type[samples]
        self.indexes_bytes = 0  # memory that the indexes in `_indexes` take
        self._lock = threading.Lock()

    @property
    def samples(self) -> int:
        return self.manifest.samples

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """The manifest's parts, or the whole dataset as one."""
        return self.manifest.parts or (
            Part(
                name=self.store.url.rpartition("/")[2],
                url=self.manifest.shards_url,
                shards=self.manifest.shards,
            ),
        )

    @functools.cached_property
    def part_starts(self) -> Ints:
        """int64[parts + 1]: the id of each part's first sample, and the number of samples."""
        return self.shard_starts[np.cumsum([0, *(part.shards for part in self.parts)])]

    def part_of(self, sample_ids: Ints) -> Ints:
        """The number of each sample's part: int64[n]."""
        return np.searchsorted(self.part_starts, sample_ids, side="right") - 1

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def mean_sample_bytes(self) -> float:
        """Mean size of an image in bytes."""
        return self.manifest.image_bytes / max(self.samples, 1)

    @functools.cached_property
    def mean_read_bytes(self) -> float:
        """About how many bytes are read for a sample, on average.

        It is the size of the image, unless much else lies between the images, as in a view. Then readers read some of that
        too, but at most as much as the images themselves (`pipeline.loading.readahead`).
        """
        image = self.mean_sample_bytes
        read = min(self.shard_bytes.sum() / max(self.samples, 1), 2 * image + SMALL_GAP_BYTES)
        return float(read) if read > 1.25 * image + SMALL_GAP_BYTES else image

    @property
    def shard_sha256(self) -> pa.ChunkedArray:
        return self._digests["sha256"]

    @property
    def shard_content(self) -> pa.ChunkedArray:
        return self._digests["content"]

    @functools.cached_property
    def _digests(self) -> pa.Table:
        name = self.manifest.table
        table = read_shard_table(self.store, name)
        return parse_parquet(self.store.describe(name), table, SHARDS_SCHEMA, ["sha256", "content"])

    def shard_name(self, shard: int) -> str:
        return self.shard_names[shard].as_py()

    def locate(
        self, sample_ids: npt.ArrayLike, read: Callable[[int], bytes | memoryview] | None = None
    ) -> Located:
        """Look up the shard and the index row of each sample.

        Args:
            sample_ids: int[n].
            read: returns the bytes of a shard's index; called for indexes that are not in memory. By default they
                are read from the store.
        """
        shard, row = self._shard_and_row(sample_ids)
        rows = np.empty(len(shard), self.row_type)
        by_shard = np.argsort(shard, kind="stable")
        groups = np.split(by_shard, np.flatnonzero(np.diff(shard[by_shard])) + 1) if len(shard) else []
        # Indexes in memory first: reading another one may evict them.
        for group in sorted(groups, key=lambda group: not self.has_index(int(shard[group[0]]))):
            rows[group] = self.index(int(shard[group[0]]), read)[row[group]]
        return Located(shard, rows)

    def shards_of(self, sample_ids: npt.ArrayLike) -> list[int]:
        """The numbers of the shards that contain these samples, sorted."""
        return np.unique(self._shard_and_row(sample_ids)[0]).tolist()

    def index(
        self, shard: int, read: Callable[[int], bytes | memoryview] | None = None
    ) -> npt.NDArray[np.void]:
        """The index of a shard: row_type[samples]. `read`: see `locate`."""
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        data = read(shard) if read else self._read(index_name(self.shard_name(shard)))
        table = self._parse_index(shard, data, list(INDEX_ROW.names or ()))
        rows = np.empty(len(table), self.row_type)
        for name in INDEX_ROW.names or ():
            if name != "label" or self.manifest.labels == "class":
                rows[name] = table[name].to_numpy()
        if self.manifest.labels != "class" and not _read_targets(table["label"], self.manifest, rows):
            raise UserError(
                f"{self.store.describe(index_name(self.shard_name(shard)))} is damaged (it has labels that the manifest does "
                "not have): copy or build the dataset again"
            )
        self._check_rows(shard, rows)
        with self._lock:
            if shard not in self._indexes:
                self._indexes[shard] = rows
                self.indexes_bytes += rows.nbytes
                while self.indexes_bytes > INDEX_BYTES and len(self._indexes) > 1:
                    self.indexes_bytes -= self._indexes.popitem(last=False)[1].nbytes
        return rows

    def has_index(self, shard: int) -> bool:
        """Whether the shard's index is in memory."""
        return shard in self._indexes

    def _check_rows(self, shard: int, rows: npt.NDArray[np.void]) -> None:
        """Check offsets and sizes, so that a damaged index never causes a read or an allocation of absurd size."""
        offset, size = rows["offset"], rows["size"]
        inside = (offset >= 0) & (size > 0) & (offset <= self.shard_bytes[shard] - size)
        if not (inside & (rows["width"] > 0) & (rows["height"] > 0)).all():
            raise UserError(
                f"{self.store.describe(index_name(self.shard_name(shard)))} is damaged (it has images "
                "outside their shard, or without a size): copy or build the dataset again"
            )

    def labels(self, rows: npt.NDArray[np.void]) -> npt.NDArray[Any]:
        """The labels of n index rows (row_type[n]), by what labels are in this dataset (`Manifest.labels`).

        Returns:
            "class": int64[n], NO_LABEL for a sample without a label.
            "classes": float32[n, classes], 1 for each class of a sample, 0 for the others; NaN without a label.
            "numbers": float32[n, classes], where `classes` is how many each sample has; NaN without a label.
        """
        if self.manifest.labels == "class":
            return rows["label"].astype(np.int64)
        if self.manifest.labels == "numbers":
            return np.ascontiguousarray(rows["target"])
        flags = np.unpackbits(rows["target"], axis=1, count=len(self.manifest.classes)).astype(np.float32)
        flags[rows["label"] == NO_LABEL] = np.nan
        return flags

    def keys(self, sample_ids: npt.ArrayLike) -> list[str]:
        """The WebDataset key of each sample id."""
        shard, row = self._shard_and_row(sample_ids)
        return [self.shard_keys(int(s))[int(r)].as_py() for s, r in zip(shard, row, strict=True)]

    def _shard_and_row(self, sample_ids: npt.ArrayLike) -> tuple[Ints, Ints]:
        ids = np.asarray(sample_ids, np.int64)
        shard = np.searchsorted(self.shard_starts, ids, side="right") - 1
        return shard, ids - self.shard_starts[shard]

    def read_index_table(self, shard: int, kept: bool = False) -> pa.Table:
        """Read the whole index of a shard, with keys: `index_schema` of the dataset's labels.

        `kept`: also the columns that `--keep-json` kept, in the order of the file.
        """
        data = self._read(index_name(self.shard_name(shard)))
        table = self._parse_index(shard, data, INDEX_SCHEMA.names)
        if kept:
            everything = read_parquet(data)
            for name in [name for name in everything.column_names if name not in INDEX_SCHEMA.names]:
                table = table.append_column(name, everything[name])
        return table

    def _read(self, name: str) -> bytes:
        return read_file(self.store, name)

    def _parse_index(self, shard: int, data: bytes | memoryview, columns: list[str]) -> pa.Table:
        name = index_name(self.shard_name(shard))
        table = parse_parquet(self.store.describe(name), data, index_schema(self.manifest.labels), columns)
        if len(table) != self.shard_samples[shard]:
            raise UserError(
                f"{self.store.describe(name)} has {len(table)} rows, but the manifest says "
                f"{self.shard_samples[shard]}: copy or build the dataset again"
            )
        return table

    def _read_keys(self, shard: int) -> pa.ChunkedArray:
        return self._parse_index(shard, self._read(index_name(self.shard_name(shard))), ["key"])["key"]


def _read_targets(labels: pa.ChunkedArray, manifest: Manifest, rows: npt.NDArray[np.void]) -> bool:
    """Fill `target` and `label` of index rows (see `index_row`). Returns whether all labels fit the manifest."""
    lists = labels.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    missing = lists.is_null().to_numpy(zero_copy_only=False)
    counts = np.where(missing, 0, lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    rows["label"] = np.where(missing, NO_LABEL, 0)
    if manifest.labels == "numbers":
        rows["target"] = np.nan
        if not (counts[~missing] == len(manifest.classes)).all():
            return False
        rows["target"][~missing] = values.reshape(-1, len(manifest.classes))
        return True
    if len(values) and not (values.min() >= 0 and values.max() < len(manifest.classes)):
        return False
    targets = np.zeros(rows["target"].shape, np.uint8)
    row = np.repeat(np.arange(len(rows)), counts)
    np.bitwise_or.at(targets, (row, values >> 3), np.uint8(128) >> (values & 7).astype(np.uint8))
    rows["target"] = targets
    return True


def open_dataset(url: str, already_reached: bool = False) -> Dataset:
    """Open the dataset at a path or URL. UserError if there is none, or this version cannot read it.

    `already_reached`: see `open_store`.
    """
    store = open_store(url, already_reached)
    try:
        text = store.read(MANIFEST)
    except FileNotFoundError:
        hint = (
            "an unfinished build: run the same command again to resume it"
            if store.exists(BUILDING)
            else "is the path right? To make a dataset of images, run `maestream shards build`; to use existing WebDataset "
            "tars, run `maestream shards index`"
        )
        raise UserError(f"{store.url} is not a dataset: it has no {MANIFEST} ({hint})") from None
    try:
        version = json.loads(text)["format_version"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{store.describe(MANIFEST)} has format version {version}, but this version of maestream reads "
                f"at most {FORMAT_VERSION}: upgrade maestream"
            )
        if version < 1:
            raise ValueError(f"format version {version}")
        manifest = Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{store.describe(MANIFEST)} is damaged ({first}): copy or build the dataset again"
        ) from None
    table, name = read_shard_table(store, manifest.table), store.describe(manifest.table)
    shards = parse_parquet(name, table, SHARDS_SCHEMA, TRAINING_COLUMNS)
    contents = parse_parquet_column(name, table, SHARDS_SCHEMA, "content")
    if not _is_consistent(manifest, shards, contents):
        raise UserError(f"{name} does not match {MANIFEST}: copy or build the dataset again")
    shard_store = open_tars(tars_url(store.url, manifest), already_reached)
    identity = hashlib.sha256(text)
    identity.update(table)
    return Dataset(store, shard_store, manifest, shards, identity.hexdigest())


def tars_url(url: str, manifest: Manifest) -> str:
    """The URL (for `open_tars`) of the tars of the dataset at `url`."""
    if manifest.parts:
        return mounts_url({part.prefix: part.url or url for part in manifest.parts})
    return manifest.shards_url or url


def _is_consistent(manifest: Manifest, shards: pa.Table, contents: Iterable[pa.ChunkedArray]) -> bool:
    samples, sizes = shards["samples"].to_numpy(), shards["bytes"].to_numpy()
    return (
        len(shards) == manifest.shards
        and bool((samples >= 0).all() and (sizes >= 0).all())
        and int(samples.sum()) == manifest.samples
        and 0 <= manifest.image_bytes <= int(sizes.sum())
        and fingerprint(contents, manifest.parts) == manifest.fingerprint
        and (not manifest.parts or sum(part.shards for part in manifest.parts) == manifest.shards)
    )
