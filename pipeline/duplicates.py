"""Images that are the same to the last byte."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.ahead import THREADS, Run, map_ahead
from pipeline.items import Item, Ranges, Scenes, Source, map_items, rows_of
from pipeline.manifest import Dataset

DIGEST_BYTES = 16
PART_IMAGES = 2048  # of a task


@dataclass(frozen=True)
class _Part:
    """What a task is given."""

    first: int
    items: pa.Table
    reader: Ranges | Scenes
    memory: int


def without_duplicates(source: Source, run: Run, memory: int) -> tuple[Source, list[str]]:
    """The source with the first of each, and a line for each that is left out. Reads all of it once."""
    digests = np.zeros(len(source.items), f"V{DIGEST_BYTES}")
    firsts = range(0, len(digests), PART_IMAGES)
    # Not slices: the whole table would go with each of them.
    parts = (
        _Part(
            first,
            source.items.take(np.arange(first, min(first + PART_IMAGES, len(digests)))),
            source.reader,
            memory,
        )
        for first in firsts
    )
    for first, part in run(_digests_of, parts):
        digests[first : first + len(part) // DIGEST_BYTES] = np.frombuffer(part, digests.dtype)
    _, first_of, same = np.unique(digests, return_index=True, return_inverse=True)
    twice = np.flatnonzero(first_of[same] != np.arange(len(digests)))
    pairs = zip(
        rows_of(source.items.take(twice)), rows_of(source.items.take(first_of[same[twice]])), strict=True
    )
    lines = [f"{one.describe()} is the same as {other.describe()}" for one, other in pairs]
    keep = np.ones(len(source.items), np.bool_)
    keep[twice] = False
    return replace(source, items=source.items.filter(pa.array(keep))), lines


def _digests_of(part: _Part) -> tuple[int, bytes]:
    read = part.reader.open()

    def digest(item: Item) -> bytes:
        return hashlib.blake2b(read(item), digest_size=DIGEST_BYTES).digest()

    items = rows_of(part.items)
    return part.first, b"".join(map_items(digest, items, part.reader, part.memory))


def duplicates_in(dataset: Dataset) -> list[str]:
    """A line for each sample that is the same as one before it. Only samples of one size and checksum are read."""
    mark = np.concatenate(
        list(map_ahead(lambda shard: _marks(dataset, shard), range(dataset.manifest.shards), THREADS))
    )
    _, inverse, counts = np.unique(mark, return_inverse=True, return_counts=True)
    ids = np.flatnonzero(counts[inverse] > 1)
    ids = ids[np.argsort(mark[ids], kind="stable")]
    located = dataset.locate(ids)

    def read(nth: int) -> bytes:
        name = dataset.shard_name(int(located.shard[nth]))
        data = dataset.shard_store.read_range(name, int(located.offset[nth]), int(located.size[nth]))
        return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()

    keys, lines = dataset.keys(ids), []
    first: dict[bytes, str] = {}
    for nth, digest in enumerate(map_ahead(read, range(len(ids)), THREADS)):
        if digest in first:
            lines.append(f"{keys[nth]} is the same as {first[digest]}")
        first.setdefault(digest, keys[nth])
    return lines


def _marks(dataset: Dataset, shard: int) -> npt.NDArray[np.uint64]:
    rows = dataset.index(shard)
    return rows["size"].astype(np.uint64) << np.uint64(32) | rows["crc32c"].astype(np.uint64)
