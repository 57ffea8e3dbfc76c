"""What a sharded dataset is: a manifest, a table of shards, and an index beside each shard.

    DEST/manifest.json               totals, class names, fingerprint; written last, so it makes the dataset
    DEST/shards.parquet              a row a shard, in the manifest's order
    DEST/shard-000000.tar            plain WebDataset
    DEST/index/shard-000000.parquet  a row a sample, in the tar's order

A sample's id is its ordinal in the manifest's order. Indexes are read when a shard is first needed, so
opening costs the same whatever the number of samples.
"""

import functools
import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipeline.errors import UserError
from pipeline.storage import FIRST_DEADLINE_S, Store, open_store

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


COLUMNS = ("offset", "size", "label", "width", "height", "crc32c")  # of the index, but for the key


@dataclass(frozen=True)
class Located:
    """Where some samples lie: the shard of each, and its columns of the index, each of length n."""

    shard: Ints
    offset: Ints
    size: Ints
    label: Ints
    width: Ints
    height: Ints
    crc32c: Ints


class Dataset:
    """An opened dataset. Safe to use from several threads."""

    def __init__(self, store: Store, manifest: Manifest, shards: pa.Table) -> None:
        self.store = store  # of manifest, table and indexes
        self.shard_store = open_store(manifest.shards_url) if manifest.shards_url else store  # of the tars
        self.manifest = manifest
        self.shard_names: pa.ChunkedArray = shards["name"]
        self.shard_samples: Ints = shards["samples"].to_numpy().astype(np.int64)
        self.shard_bytes: Ints = shards["bytes"].to_numpy().astype(np.int64)
        self.shard_sha256: pa.ChunkedArray = shards["sha256"]
        self.shard_content: pa.ChunkedArray = shards["content"]
        self.shard_starts: Ints = np.concatenate([[0], np.cumsum(self.shard_samples)])  # first id of each
        self.index = functools.lru_cache(maxsize=2048)(self._read_index)
        self.shard_keys = functools.lru_cache(maxsize=2048)(self._read_keys)

    @property
    def samples(self) -> int:
        return self.manifest.samples

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def mean_sample_bytes(self) -> float:
        return self.manifest.image_bytes / max(self.samples, 1)

    def shard_name(self, shard: int) -> str:
        return self.shard_names[shard].as_py()

    def locate(self, sample_ids: npt.ArrayLike) -> Located:
        """Shard and index row of each sample id (int[n])."""
        shard, row = self._shard_and_row(sample_ids)
        columns = np.empty((len(COLUMNS), len(shard)), np.int64)
        by_shard = np.argsort(shard, kind="stable")
        for here in np.split(by_shard, np.flatnonzero(np.diff(shard[by_shard])) + 1):
            columns[:, here] = self.index(int(shard[here[0]]))[:, row[here]]
        return Located(shard, *columns)

    def keys(self, sample_ids: npt.ArrayLike) -> list[str]:
        """The WebDataset key of each sample id."""
        shard, row = self._shard_and_row(sample_ids)
        return [self.shard_keys(int(s))[int(r)].as_py() for s, r in zip(shard, row, strict=True)]

    def _shard_and_row(self, sample_ids: npt.ArrayLike) -> tuple[Ints, Ints]:
        ids = np.asarray(sample_ids, np.int64)
        shard = np.searchsorted(self.shard_starts, ids, side="right") - 1
        return shard, ids - self.shard_starts[shard]

    def read_index_table(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        name = index_name(self.shard_name(shard))
        table = read_parquet(self.store, name, INDEX_SCHEMA, columns)
        if len(table) != self.shard_samples[shard]:
            raise UserError(
                f"{self.store.describe(name)} has {len(table)} rows, the manifest says "
                f"{self.shard_samples[shard]}: copy or build the dataset again"
            )
        return table

    def _read_keys(self, shard: int) -> pa.ChunkedArray:
        return self.read_index_table(shard, ["key"])["key"]

    def _read_index(self, shard: int) -> Ints:
        """int[len(COLUMNS), samples of the shard]."""
        table = self.read_index_table(shard, list(COLUMNS))
        return np.stack([table[name].to_numpy().astype(np.int64) for name in COLUMNS])


def index_name(shard_name: str) -> str:
    return f"index/{shard_name.removesuffix('.tar')}.parquet"


def read_parquet(store: Store, name: str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)} is missing: copy or build the dataset again") from None
    try:
        # Not pq.read_table: it leaves Arrow's threads behind, and a process that ends soon after aborts now and
        # then ("terminate called without an active exception").
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True, pre_buffer=False)
        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        table = file.read(wanted.names, use_threads=False).select(wanted.names).cast(wanted)
        table.validate(full=True)
        if missing := [c for c in table.column_names if table[c].null_count]:
            raise ValueError(f"no values for {', '.join(missing)}")
        return table
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # pyarrow raises any of them
        what = " ".join(str(error).split())
        raise UserError(
            f"{store.describe(name)} is damaged ({what}): copy or build the dataset again"
        ) from None


def to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


def content_digest(index: pa.Table) -> str:
    """SHA-256 of what is trained on in a shard: key, label, size and checksum of each image, in order."""
    rows = index.select(["key", "label", "size", "crc32c"]).to_pylist()
    return hashlib.sha256(json.dumps([list(row.values()) for row in rows]).encode()).hexdigest()


def fingerprint(contents: pa.ChunkedArray) -> str:
    """The dataset's identity: a digest over its shards' content digests, in order. Paths, dates and tools are
    not in it."""
    return hashlib.sha256("\n".join(contents.to_pylist()).encode()).hexdigest()


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
        fingerprint=fingerprint(shards["content"]),
        samples=sum(shards["samples"].to_pylist()),
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


def open_dataset(url: str) -> Dataset:
    """Open the dataset at a path or URL. UserError where there is none, or one this version cannot read."""
    store = open_store(url)
    try:
        text = store.read(MANIFEST, FIRST_DEADLINE_S)
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
        manifest = Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{store.describe(MANIFEST)} is damaged ({first}): copy or build the dataset again"
        ) from None
    shards = read_parquet(store, SHARDS, SHARDS_SCHEMA)
    if len(shards) != manifest.shards or sum(shards["samples"].to_pylist()) != manifest.samples:
        raise UserError(
            f"{store.describe(SHARDS)} does not belong to {MANIFEST}: copy or build the dataset again"
        )
    return Dataset(store, manifest, shards)


BUILDING = "building.json"  # present while a build is under way, see pipeline.shards


def _begun(store: Store) -> bool:
    return store.exists(BUILDING)
