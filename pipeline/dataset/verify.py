"""Verify a dataset: compare tars and indexes with the checksums that were stored when it was written."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from crc32c import crc32c

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.image_check import check_image
from pipeline.dataset.manifest import MANIFEST, LabelKind, content_digest, index_name, index_schema
from pipeline.errors import UserError
from pipeline.images.convert import type_problem
from pipeline.images.pixels import Pixels
from pipeline.parallel import ParallelMap
from pipeline.storage.mounts import open_tars
from pipeline.storage.parquet import parse_parquet
from pipeline.storage.store import PART_BYTES, open_shared, open_store


@dataclass(frozen=True)
class VerifyJob:
    """One shard to verify: where tar and index are, and what the table of shards says about them. The input of one task."""

    store: str  # URL of manifest and indexes
    shard_store: str  # URL of the tars
    name: str
    samples: int
    bytes: int
    sha256: str  # "" if unknown
    content: str
    checksums: bool
    labels: LabelKind
    pixels: Pixels


@dataclass
class ShardProblems:
    """What is wrong with a shard."""

    name: str
    problems: list[str] = field(default_factory=list)  # one line each
    tar_ok: bool = True  # as far as size and checksum tell
    index_ok: bool = True


def verify(
    dataset: Dataset, run: ParallelMap = map, on_shard: Callable[[], None] = lambda: None
) -> list[str]:
    """Read every byte and decode every image. Returns one line per problem.

    In a dataset without checksums only images that cannot be decoded are found.
    """
    return [line for shard in find_damage(dataset, run, on_shard) for line in shard.problems]


def find_damage(dataset: Dataset, run: ParallelMap, on_shard: Callable[[], None]) -> list[ShardProblems]:
    """Return the shards that have problems, sorted by name. Arguments as in `verify`."""
    found = []
    for shard in run(_verify_shard, verify_jobs(dataset)):
        if shard.problems:
            found.append(shard)
        on_shard()
    return sorted(found, key=lambda shard: shard.name)


def verify_jobs(dataset: Dataset) -> Iterator[VerifyJob]:
    """The job of each shard, in the manifest's order."""
    manifest = dataset.manifest
    for shard in range(manifest.shards):
        yield VerifyJob(
            dataset.store.url,
            dataset.shard_store.url,
            dataset.shard_name(shard),
            int(dataset.shard_samples[shard]),
            int(dataset.shard_bytes[shard]),
            dataset.shard_sha256[shard].as_py(),
            dataset.shard_content[shard].as_py(),
            manifest.checksums,
            manifest.labels,
            manifest.pixels,
        )


def _verify_shard(job: VerifyJob) -> ShardProblems:
    open_shared(job.store, MANIFEST)
    found = ShardProblems(job.name)
    index = _verify_index(job, found)
    rows = [] if index is None else sorted(index.to_pylist(), key=lambda row: row["offset"])
    try:
        found.problems += _verify_tar(job, found, rows)
    except FileNotFoundError:
        found.problems.insert(0, f"{job.name}: missing")
        found.tar_ok = False
    return found


def _verify_tar(job: VerifyJob, found: ShardProblems, rows: list[dict[str, Any]]) -> list[str]:
    """Read the tar once, in parts, and return the problems of its images, which `rows` of the index locate.

    Problems of the tar itself go into `found`.
    """
    store, digest = open_tars(job.shard_store, already_reached=True), hashlib.sha256()
    size = store.size(job.name)
    if size != job.bytes:
        found.problems.insert(0, f"{job.name}: {size} bytes, but the manifest says {job.bytes}")
        found.tar_ok = False
    problems, held, start = [], b"", 0  # bytes from `start` on that an image may still need

    def read_until(end: int) -> None:
        nonlocal held
        while start + len(held) < min(end, size):
            at = start + len(held)
            part = store.read_range(job.name, at, min(PART_BYTES, size - at))
            digest.update(part)
            held += part

    for row in rows:
        read_until(row["offset"] + row["size"])
        image = held[max(row["offset"] - start, 0) : max(row["offset"] - start + row["size"], 0)]
        if problem := _verify_image(job, row, image):
            problems.append(f"{job.name}: {row['key']} at byte {row['offset']}: {problem}")
        drop = max(row["offset"] - start, 0)
        held, start = held[drop:], start + min(drop, len(held))
    while start + len(held) < size:
        start, held = start + len(held), b""
        read_until(start + 1)
    if size == job.bytes and job.sha256 not in ("", digest.hexdigest()):
        found.problems.insert(0, f"{job.name}: the tar changed since it was written (sha256 differs)")
        found.tar_ok = False
    return problems


def _verify_image(job: VerifyJob, row: dict[str, Any], image: bytes) -> str | None:
    """What is wrong with an image, or None."""
    if len(image) != row["size"]:
        return "cut off"
    if job.checksums and crc32c(image) != row["crc32c"]:
        return "the image changed since it was written (crc32c differs)"
    try:
        checked = check_image(image)
    except ValueError as error:
        return f"cannot be decoded ({error})"
    if problem := type_problem(checked.channels, checked.dtype, job.pixels):
        return problem
    if (checked.width, checked.height) != (row["width"], row["height"]):
        return (
            f"{checked.width} × {checked.height} pixels, but the index says {row['width']} × {row['height']}"
        )
    return None


def _verify_index(job: VerifyJob, found: ShardProblems) -> pa.Table | None:
    """Return the index, or None if it is missing or cannot be read. Problems go into `found`."""
    store, name = open_store(job.store, already_reached=True), index_name(job.name)
    try:
        schema = index_schema(job.labels)
        index = parse_parquet(store.describe(name), store.read(name), schema, schema.names)
    except FileNotFoundError:
        found.problems.append(f"{name}: missing")
    except UserError as error:
        found.problems.append(str(error))
    else:
        if content_digest(index) == job.content:
            return index
        found.problems.append(f"{name}: the index changed since it was written (digest differs)")
        found.index_ok = False
        return index
    found.index_ok = False
    return None
