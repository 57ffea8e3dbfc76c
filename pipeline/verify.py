"""Find out whether a dataset is as it was written."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from crc32c import crc32c

from pipeline.ahead import Run
from pipeline.errors import UserError
from pipeline.images import check_image
from pipeline.manifest import (
    INDEX_SCHEMA,
    MANIFEST,
    Dataset,
    content_digest,
    index_name,
)
from pipeline.parquet import parse_parquet
from pipeline.storage import PART_BYTES, open_shared, open_store


@dataclass(frozen=True)
class Shard:
    """What a task is given: where a shard and its index lie, and what the dataset says of them."""

    store: str  # URL of the indexes
    tars: str
    name: str
    samples: int
    bytes: int
    sha256: str  # "" where it is not known
    content: str
    checksums: bool
    classes: tuple[str, ...]


@dataclass
class Verified:
    """What is wrong with a shard."""

    name: str
    problems: list[str] = field(default_factory=list)  # a line each
    tar_is_whole: bool = True  # so far as can be known
    index_is_whole: bool = True


def verify(dataset: Dataset, run: Run = map, on_shard: Callable[[], None] = lambda: None) -> list[str]:
    """Read every byte and decode every image. Returns what is wrong, a line each; empty for a sound dataset.

    Without checksums in the manifest only what no longer decodes is found.
    """
    return [line for verified in damaged(dataset, run, on_shard) for line in verified.problems]


def damaged(dataset: Dataset, run: Run, on_shard: Callable[[], None]) -> list[Verified]:
    """Of the shards of which something is wrong, what it is."""
    found = []
    for verified in run(_verify_shard, shards_of(dataset)):
        if verified.problems:
            found.append(verified)
        on_shard()
    return sorted(found, key=lambda verified: verified.name)


def shards_of(dataset: Dataset) -> Iterator[Shard]:
    manifest = dataset.manifest
    for shard in range(manifest.shards):
        yield Shard(
            dataset.store.url,
            dataset.shard_store.url,
            dataset.shard_name(shard),
            int(dataset.shard_samples[shard]),
            int(dataset.shard_bytes[shard]),
            dataset.shard_sha256[shard].as_py(),
            dataset.shard_content[shard].as_py(),
            manifest.checksums,
            tuple(manifest.classes),
        )


def _verify_shard(shard: Shard) -> Verified:
    open_shared(shard.store, MANIFEST)
    verified = Verified(shard.name)
    index = _verify_index(shard, verified)
    rows = [] if index is None else sorted(index.to_pylist(), key=lambda row: row["offset"])
    try:
        verified.problems += _verify_tar(shard, verified, rows)
    except FileNotFoundError:
        verified.problems.insert(0, f"{shard.name}: missing")
        verified.tar_is_whole = False
    return verified


def _verify_tar(shard: Shard, verified: Verified, rows: list[dict[str, Any]]) -> list[str]:
    """Read all of it once, in parts. What is wrong with the images where the index says they are."""
    store, digest = open_store(shard.tars, known=True), hashlib.sha256()
    size = store.size(shard.name)
    if size != shard.bytes:
        verified.problems.insert(0, f"{shard.name}: {size} bytes, the manifest says {shard.bytes}")
        verified.tar_is_whole = False
    problems, held, start = [], b"", 0  # the bytes from `start` on that an image may still need

    def read_until(end: int) -> None:
        nonlocal held
        while start + len(held) < min(end, size):
            at = start + len(held)
            part = store.read_range(shard.name, at, min(PART_BYTES, size - at))
            digest.update(part)
            held += part

    for row in rows:
        read_until(row["offset"] + row["size"])
        image = held[max(row["offset"] - start, 0) : max(row["offset"] - start + row["size"], 0)]
        if problem := _verify_image(shard, row, image):
            problems.append(f"{shard.name}: {row['key']} at byte {row['offset']}: {problem}")
        drop = max(row["offset"] - start, 0)
        held, start = held[drop:], start + min(drop, len(held))
    while start + len(held) < size:
        start, held = start + len(held), b""
        read_until(start + 1)
    if size == shard.bytes and shard.sha256 not in ("", digest.hexdigest()):
        verified.problems.insert(
            0, f"{shard.name}: its bytes are not those that were written (sha256 differs)"
        )
        verified.tar_is_whole = False
    return problems


def _verify_image(shard: Shard, row: dict[str, Any], image: bytes) -> str | None:
    """What is wrong with an image."""
    if len(image) != row["size"]:
        return "cut off"
    if shard.checksums and crc32c(image) != row["crc32c"]:
        return "its bytes changed (crc32c differs)"
    try:
        checked = check_image(image)
    except ValueError as error:
        return f"does not decode ({error})"
    if (checked.width, checked.height) != (row["width"], row["height"]):
        return f"{checked.width} × {checked.height}, the index says otherwise"
    return None


def _verify_index(shard: Shard, verified: Verified) -> pa.Table | None:
    """Its rows, unless it is missing or cannot be read."""
    store, name = open_store(shard.store, known=True), index_name(shard.name)
    try:
        index = parse_parquet(store.describe(name), store.read(name), INDEX_SCHEMA, INDEX_SCHEMA.names)
    except FileNotFoundError:
        verified.problems.append(f"{name}: missing")
    except UserError as error:
        verified.problems.append(str(error))
    else:
        if content_digest(index) == shard.content:
            return index
        verified.problems.append(f"{name}: it is not the index that was written (digest differs)")
        verified.index_is_whole = False
        return index
    verified.index_is_whole = False
    return None
