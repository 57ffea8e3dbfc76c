"""What a sharded dataset is: a manifest, a table of shards, and an index beside each shard.

    DEST/manifest.json               totals, class names, fingerprint; written last, so it makes the dataset
    DEST/shards.parquet              a row a shard, in the manifest's order
    DEST/shard-000000.tar            plain WebDataset
    DEST/index/shard-000000.parquet  a row a sample, in the tar's order

A sample's id is its ordinal in the manifest's order. Indexes are read when a shard is first needed, so
opening costs the same whatever the number of samples. Of the table only what training needs stays in memory,
about 50 bytes a shard: what its columns of digests say is read when somebody asks.
"""

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline.errors import UserError
from pipeline.parquet import PART_ROWS, parse_parquet, parse_parquet_column, to_parquet
from pipeline.storage import Store, open_store

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards.parquet"
NO_LABEL = -1

SHARDS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),  # of the tar
        ("sha256", pa.string()),  # of the tar; "" where its bytes were not read
        ("content", pa.string()),  # digest of what is trained on, see content_digest
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # of the image's first byte in the tar
        ("size", pa.int32()),
        ("label", pa.int32()),  # NO_LABEL where there is none
        ("width", pa.int32()),  # as stored: EXIF orientation is ignored everywhere
        ("height", pa.int32()),
        ("crc32c", pa.uint32()),  # of the image's bytes; 0 where they were not read
    ]
)

Ints = npt.NDArray[np.int64]


class Manifest(BaseModel):
    """manifest.json."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: int
    fingerprint: str
    samples: int
    shards: int
    image_bytes: int
    classes: list[str]
    built: dict[str, Any]  # how it was made; for people, nothing depends on it
    checksums: bool = True  # whether crc32c (of the indexes) and sha256 (of the table) are known
    shards_url: str | None = None  # where the tars lie, if not beside this file


INDEX_ROW = np.dtype(
    [(field.name, field.type.to_pandas_dtype()) for field in INDEX_SCHEMA if field.name != "key"]
)
TRAINING_COLUMNS = ["name", "samples", "bytes"]  # of SHARDS_SCHEMA, in memory from the opening on
PART_BYTES = 8 << 20  # of the table of shards are asked for at once
INDEX_BYTES = 128 << 20  # of indexes are kept in memory, those used last: 450 shards of 10 000 samples


@dataclass(frozen=True)
class Located:
    """Where samples lie: the shard of each (int64[n]), and its row of the index (INDEX_ROW[n])."""

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
    """An opened dataset. Safe to use from several threads."""

    def __init__(
        self, store: Store, shard_store: Store, manifest: Manifest, shards: pa.Table, identity: str
    ) -> None:
        self.store = store  # of manifest, table and indexes
        self.shard_store = shard_store  # of the tars
        self.manifest = manifest
        self.identity = identity  # of the shards as files, where the fingerprint is of what is trained on
        self.shard_names: pa.ChunkedArray = shards["name"]
        self.shard_samples: Ints = shards["samples"].to_numpy()
        self.shard_bytes: Ints = shards["bytes"].to_numpy()
        self.shard_starts: Ints = np.concatenate([[0], np.cumsum(self.shard_samples)])  # first id of each
        self.shard_keys = functools.lru_cache(maxsize=16)(self._read_keys)
        self._indexes: OrderedDict[int, npt.NDArray[np.void]] = OrderedDict()  # shard → INDEX_ROW[samples]
        self._indexes_bytes = 0
        self._lock = threading.Lock()

    @property
    def samples(self) -> int:
        return self.manifest.samples

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def mean_sample_bytes(self) -> float:
        return self.manifest.image_bytes / max(self.samples, 1)

    @property
    def shard_sha256(self) -> pa.ChunkedArray:
        return self._digests["sha256"]

    @property
    def shard_content(self) -> pa.ChunkedArray:
        return self._digests["content"]

    @functools.cached_property
    def _digests(self) -> pa.Table:
        return parse_parquet(
            self.store.describe(SHARDS), read_shards(self.store), SHARDS_SCHEMA, ["sha256", "content"]
        )

    def shard_name(self, shard: int) -> str:
        return self.shard_names[shard].as_py()

    def locate(
        self, sample_ids: npt.ArrayLike, read: Callable[[int], bytes | memoryview] | None = None
    ) -> Located:
        """Shard and index row of each sample id (int[n]). Reads the indexes that are not in memory, with `read`
        (of a shard, the bytes of its index) if it is given."""
        shard, row = self._shard_and_row(sample_ids)
        rows = np.empty(len(shard), INDEX_ROW)
        by_shard = np.argsort(shard, kind="stable")
        samples = np.split(by_shard, np.flatnonzero(np.diff(shard[by_shard])) + 1) if len(shard) else []
        # Those in memory first: what is read drives out what was used longest ago.
        for here in sorted(samples, key=lambda here: not self.has_index(int(shard[here[0]]))):
            rows[here] = self.index(int(shard[here[0]]), read)[row[here]]
        return Located(shard, rows)

    def shards_of(self, sample_ids: npt.ArrayLike) -> list[int]:
        """The shards that these samples lie in."""
        return np.unique(self._shard_and_row(sample_ids)[0]).tolist()

    def index(
        self, shard: int, read: Callable[[int], bytes | memoryview] | None = None
    ) -> npt.NDArray[np.void]:
        """INDEX_ROW[samples of the shard]. `read`: see `locate`."""
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        data = read(shard) if read else self._read(index_name(self.shard_name(shard)))
        table = self._parse_index(shard, data, list(INDEX_ROW.names or ()))
        rows = np.empty(len(table), INDEX_ROW)
        for name in INDEX_ROW.names or ():
            rows[name] = table[name].to_numpy()
        self._check_rows(shard, rows)
        with self._lock:
            if shard not in self._indexes:
                self._indexes[shard] = rows
                self._indexes_bytes += rows.nbytes
                while self._indexes_bytes > INDEX_BYTES and len(self._indexes) > 1:
                    self._indexes_bytes -= self._indexes.popitem(last=False)[1].nbytes
        return rows

    def has_index(self, shard: int) -> bool:
        """Whether the shard's index is in memory."""
        return shard in self._indexes

    def _check_rows(self, shard: int, rows: npt.NDArray[np.void]) -> None:
        """So that nobody reads, or makes room for, what cannot be there."""
        offset, size = rows["offset"], rows["size"]
        inside = (offset >= 0) & (size > 0) & (offset <= self.shard_bytes[shard] - size)
        if not (inside & (rows["width"] > 0) & (rows["height"] > 0)).all():
            raise UserError(
                f"{self.store.describe(index_name(self.shard_name(shard)))} is damaged (it has images that lie "
                "outside of their shard, or have no size): copy or build the dataset again"
            )

    def keys(self, sample_ids: npt.ArrayLike) -> list[str]:
        """The WebDataset key of each sample id."""
        shard, row = self._shard_and_row(sample_ids)
        return [self.shard_keys(int(s))[int(r)].as_py() for s, r in zip(shard, row, strict=True)]

    def _shard_and_row(self, sample_ids: npt.ArrayLike) -> tuple[Ints, Ints]:
        ids = np.asarray(sample_ids, np.int64)
        shard = np.searchsorted(self.shard_starts, ids, side="right") - 1
        return shard, ids - self.shard_starts[shard]

    def read_index_table(self, shard: int) -> pa.Table:
        """The whole index of a shard, INDEX_SCHEMA."""
        return self._parse_index(shard, self._read(index_name(self.shard_name(shard))), INDEX_SCHEMA.names)

    def _read(self, name: str) -> bytes:
        return read_object(self.store, name)

    def _parse_index(self, shard: int, data: bytes | memoryview, columns: list[str]) -> pa.Table:
        name = index_name(self.shard_name(shard))
        table = parse_parquet(self.store.describe(name), data, INDEX_SCHEMA, columns)
        if len(table) != self.shard_samples[shard]:
            raise UserError(
                f"{self.store.describe(name)} has {len(table)} rows, the manifest says "
                f"{self.shard_samples[shard]}: copy or build the dataset again"
            )
        return table

    def _read_keys(self, shard: int) -> pa.ChunkedArray:
        return self._parse_index(shard, self._read(index_name(self.shard_name(shard))), ["key"])["key"]


def index_name(shard_name: str) -> str:
    return f"index/{shard_name.removesuffix('.tar')}.parquet"


def read_object(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)} is missing: copy or build the dataset again") from None


def read_shards(store: Store) -> memoryview:
    """The bytes of the table of shards: 142 MB for a million. Read in parts, because a body that is read whole is
    twice in memory while it is put together."""
    try:
        data = memoryview(bytearray(store.size(SHARDS)))
    except FileNotFoundError:
        raise UserError(f"{store.describe(SHARDS)} is missing: copy or build the dataset again") from None

    def read(start: int) -> None:
        part = store.read_range(SHARDS, start, min(PART_BYTES, len(data) - start))
        data[start : start + len(part)] = part

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(0, len(data), PART_BYTES)))
    return data


def content_digest(index: pa.Table) -> str:
    """SHA-256 of what is trained on in a shard: key, label, size and checksum of each image, in order."""
    rows = index.select(["key", "label", "size", "crc32c"]).to_pylist()
    return hashlib.sha256(json.dumps([list(row.values()) for row in rows]).encode()).hexdigest()


def fingerprint(contents: Iterable[pa.ChunkedArray]) -> str:
    """The dataset's identity: a digest over its shards' content digests, in order. Paths, dates and tools are
    not in it. They come in parts: a million of them as Python's strings are 120 MB."""
    digest = hashlib.sha256()
    for nth, part in enumerate(contents):
        lines = "\n".join(part.to_pylist())
        digest.update(("\n" + lines if nth else lines).encode())
    return digest.hexdigest()


def write_dataset(
    store: Store,
    shards: pa.Table,
    image_bytes: int,
    classes: list[str],
    built: dict[str, Any],
    *,
    checksums: bool = True,
    shards_url: str | None = None,
) -> Manifest:
    """Write the table of shards, then the manifest: from then on it is a dataset."""
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint(
            shards["content"].slice(start, PART_ROWS) for start in range(0, len(shards), PART_ROWS)
        ),
        samples=int(shards["samples"].to_numpy().sum()),
        shards=len(shards),
        image_bytes=image_bytes,
        classes=classes,
        built=built,
        checksums=checksums,
        shards_url=shards_url,
    )
    store.write(SHARDS, to_parquet(shards))
    store.write(MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
    return manifest


def open_dataset(url: str, known: bool = False) -> Dataset:
    """Open the dataset at a path or URL. UserError where there is none, or one this version cannot read.
    `known`: see `open_store`."""
    store = open_store(url, known)
    try:
        text = store.read(MANIFEST)
    except FileNotFoundError:
        hint = (
            "a build was begun and not finished: run it again"
            if _begun(store)
            else "is the path right? `maestream shards index` takes tars made by others"
        )
        raise UserError(f"{store.url} is not a dataset: it has no {MANIFEST} ({hint})") from None
    try:
        version = json.loads(text)["format_version"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{store.describe(MANIFEST)} has format version {version}, this maestream reads up to "
                f"{FORMAT_VERSION}: use a newer maestream"
            )
        if version < 1:
            raise ValueError(f"format version {version}")
        manifest = Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{store.describe(MANIFEST)} is damaged ({first}): copy or build the dataset again"
        ) from None
    table = read_shards(store)
    shards = parse_parquet(store.describe(SHARDS), table, SHARDS_SCHEMA, TRAINING_COLUMNS)
    contents = parse_parquet_column(store.describe(SHARDS), table, SHARDS_SCHEMA, "content")
    if not _belong_together(manifest, shards, contents):
        raise UserError(
            f"{store.describe(SHARDS)} does not belong to {MANIFEST}: copy or build the dataset again"
        )
    shard_store = open_store(manifest.shards_url, known) if manifest.shards_url else store
    identity = hashlib.sha256(text)
    identity.update(table)
    return Dataset(store, shard_store, manifest, shards, identity.hexdigest())


def _belong_together(manifest: Manifest, shards: pa.Table, contents: Iterable[pa.ChunkedArray]) -> bool:
    samples, sizes = shards["samples"].to_numpy(), shards["bytes"].to_numpy()
    return (
        len(shards) == manifest.shards
        and bool((samples >= 0).all() and (sizes >= 0).all())
        and int(samples.sum()) == manifest.samples
        and 0 <= manifest.image_bytes <= int(sizes.sum())
        and fingerprint(contents) == manifest.fingerprint
    )


BUILDING = "building.json"  # present while a build is under way, see pipeline.shards
BUILDING_FOLDER = "building"  # and what it has done so far


def _begun(store: Store) -> bool:
    return store.exists(BUILDING)
