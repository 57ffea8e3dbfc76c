"""The dataset format: a manifest, a table of shards, and an index per shard.

    DEST/manifest.json               totals, class names and fingerprint
    DEST/shards.parquet              one row per shard (SHARDS_SCHEMA)
    DEST/shard-000000.tar            a plain WebDataset tar: KEY.jpg and KEY.cls for each sample
    DEST/index/shard-000000.parquet  one row per sample, in the tar's order (INDEX_SCHEMA)

The manifest is written last: a folder without one is not a dataset. Samples are numbered from 0, through all shards in
the order of shards.parquet; this number is the sample's id. The tars can be elsewhere (`Manifest.shards_url`).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline.errors import UserError
from pipeline.images.pixels import RGB, Pixels
from pipeline.storage.parquet import PART_ROWS, to_parquet
from pipeline.storage.store import Store

FORMAT_VERSION = 2  # the newest that this version of maestream reads
MANIFEST = "manifest.json"
SHARDS = "shards.parquet"
NO_LABEL = -1
BUILDING = "building.json"  # exists while a build is unfinished, see pipeline.build.build
BUILDING_FOLDER = "building"  # its finished parts

SHARDS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),  # of the tar
        ("sha256", pa.string()),  # of the tar; "" if its bytes were not read
        ("content", pa.string()),  # digest of the training data, see content_digest
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # of the image's first byte in the tar
        ("size", pa.int32()),  # of the image in bytes
        ("label", pa.int32()),  # NO_LABEL if there is none
        ("width", pa.int32()),  # pixels, as stored: EXIF orientation is ignored everywhere
        ("height", pa.int32()),
        ("crc32c", pa.uint32()),  # of the image's bytes; 0 if they were not read
    ]
)


# What the label of a sample is: the number of one class, the numbers of any number of classes, or numbers to predict.
LabelKind = Literal["class", "classes", "numbers"]


class Part(BaseModel):
    """Shards that follow each other in the table of shards, with the same place of the tars and the same weight.

    A dataset has parts if its tars are in several places, or are not all seen equally often.
    """

    model_config = ConfigDict(frozen=True)

    name: str  # in metrics
    url: str | None  # of the folder with the tars; None: that of the manifest
    shards: int
    # First folder of the shards' names in the table, in front of their names below `url`; "" for none.
    prefix: str = ""
    weight: str = "1"  # how often each sample is seen per epoch: "3", "0.5" or "1/3"

    @property
    def times(self) -> Fraction:
        """The weight as a number."""
        return Fraction(self.weight)


class Manifest(BaseModel):
    """The contents of manifest.json.

    Keys after `shards_url` are of format version 2. They are written only if they differ from their defaults, and a
    manifest without them has version 1, so that earlier versions of maestream still read it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: int
    fingerprint: str
    samples: int
    shards: int
    image_bytes: int  # total size of the images
    # The name of each class, or of each number to predict: the index of a name is its place in a label of the loader. Empty
    # if there are no labels.
    classes: list[str]
    built: dict[str, Any]  # how the dataset was made, for information
    checksums: bool = True  # whether crc32c (in the indexes) and sha256 (in the table of shards) are known
    shards_url: str | None = None  # where the tars are, if not beside this file
    labels: LabelKind = "class"
    pixels: Pixels = RGB
    parts: tuple[Part, ...] = ()  # instead of `shards_url`, see `Part`
    # The table of shards. An extension writes another one, so that the manifest alone decides which dataset there is.
    table: str = SHARDS

    @property
    def has_tars(self) -> bool:
        """Whether tars of the dataset are in its own folder."""
        return any(part.url is None for part in self.parts) if self.parts else self.shards_url is None

    @property
    def weighted(self) -> bool:
        """Whether some samples are seen more or less often than once per epoch."""
        return any(part.times != 1 for part in self.parts)

    def to_json(self) -> bytes:
        """The file's text."""
        return (
            self.model_dump_json(indent=2, exclude=VERSION_2_KEYS - self.version_2_keys()) + "\n"
        ).encode()

    def version_2_keys(self) -> set[str]:
        """Those of VERSION_2_KEYS that differ from their defaults."""
        fields = Manifest.model_fields
        return {name for name in VERSION_2_KEYS if getattr(self, name) != fields[name].default}


VERSION_2_KEYS = {"labels", "pixels", "parts", "table"}


INDEX_ROW = np.dtype(
    [(field.name, field.type.to_pandas_dtype()) for field in INDEX_SCHEMA if field.name != "key"]
)


def label_type(kind: LabelKind) -> pa.DataType:
    """The type of the index's column `label`. A list is null if the sample has no label."""
    return {"class": pa.int32(), "classes": pa.list_(pa.int32()), "numbers": pa.list_(pa.float32())}[kind]


def index_schema(kind: LabelKind) -> pa.Schema:
    """The columns that every index of a dataset with labels of this kind has."""
    label = INDEX_SCHEMA.get_field_index("label")
    return INDEX_SCHEMA.set(label, pa.field("label", label_type(kind)))


def index_row(kind: LabelKind, classes: int) -> np.dtype:
    """An index row in memory: INDEX_ROW; for labels that are lists also `target`, and `label` is 0, or NO_LABEL for none.

    target: uint8[⌈classes / 8⌉], a bit for each class as `np.packbits` orders them, or float32[classes], the numbers.
    """
    if kind == "class":
        return INDEX_ROW
    target = (
        ("target", np.uint8, (-(-classes // 8),)) if kind == "classes" else ("target", np.float32, (classes,))
    )
    return np.dtype([*((name, INDEX_ROW[name]) for name in INDEX_ROW.names or ()), target])


PART_BYTES = 8 << 20  # the table of shards is read in parts of this size


def index_name(shard_name: str) -> str:
    """The index file of a shard: "index/shard-000000.parquet" for "shard-000000.tar"."""
    return f"index/{shard_name.removesuffix('.tar')}.parquet"


def read_file(store: Store, name: str) -> bytes:
    """Read a file of a dataset. UserError if it is missing."""
    try:
        return store.read(name)
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)} is missing: copy or build the dataset again") from None


def read_shard_table(store: Store, name: str = SHARDS) -> memoryview:
    """Read the bytes of a table of shards: 142 MB for a million shards. UserError if it is missing.

    Read in parts into one buffer: `Store.read` would need twice the memory while it joins its parts.
    """
    try:
        data = memoryview(bytearray(store.size(name)))
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)} is missing: copy or build the dataset again") from None

    def read(start: int) -> None:
        part = store.read_range(name, start, min(PART_BYTES, len(data) - start))
        data[start : start + len(part)] = part

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(0, len(data), PART_BYTES)))
    return data


def content_digest(index: pa.Table) -> str:
    """SHA-256 of a shard's training data: key, label, size and crc32c of each image, in order."""
    rows = index.select(["key", "label", "size", "crc32c"]).to_pylist()
    return hashlib.sha256(json.dumps([list(row.values()) for row in rows]).encode()).hexdigest()


def fingerprint(contents: Iterable[pa.ChunkedArray], parts: Sequence[Part] = ()) -> str:
    """The dataset's identity: SHA-256 over the content digests of its shards, in order, and over the weights if they differ
    from 1.

    Independent of paths, dates and tool versions. The digests come in pieces, because a million Python strings take
    120 MB.
    """
    digest = hashlib.sha256()
    for nth, part in enumerate(contents):
        lines = "\n".join(part.to_pylist())
        digest.update(("\n" + lines if nth else lines).encode())
    if any(part.times != 1 for part in parts):
        digest.update(json.dumps([[part.shards, str(part.times)] for part in parts]).encode())
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
    labels: LabelKind = "class",
    pixels: Pixels = RGB,
    parts: Sequence[Part] = (),
    table: str = SHARDS,
) -> Manifest:
    """Write the table of shards, then the manifest. The manifest makes it a dataset, so the tars and indexes come first.

    Args:
        shards: SHARDS_SCHEMA.
        image_bytes, classes, built, checksums, shards_url, labels, pixels, parts, table: see `Manifest`.
    """
    manifest = Manifest(
        format_version=1,
        fingerprint=fingerprint(
            (shards["content"].slice(start, PART_ROWS) for start in range(0, len(shards), PART_ROWS)), parts
        ),
        samples=int(shards["samples"].to_numpy().sum()),
        shards=len(shards),
        image_bytes=image_bytes,
        classes=classes,
        built=built,
        checksums=checksums,
        shards_url=shards_url,
        labels=labels,
        pixels=pixels,
        parts=tuple(parts),
        table=table,
    )
    if manifest.version_2_keys():
        manifest = manifest.model_copy(update={"format_version": 2})
    store.write(table, to_parquet(shards))
    store.write(MANIFEST, manifest.to_json())
    return manifest
