"""Find images with identical bytes."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.build.image_table import ImageReader, Item, Source, map_items, rows_of
from pipeline.dataset.dataset import Dataset
from pipeline.parallel import THREADS, ParallelMap, map_ahead

DIGEST_BYTES = 16
JOB_IMAGES = 2048  # images per job


@dataclass(frozen=True)
class _DigestJob:
    """Images to digest. The input of one task."""

    first: int  # number of its first image
    items: pa.Table
    reader: ImageReader
    memory: int


def without_duplicates(source: Source, run: ParallelMap, memory: int) -> tuple[Source, list[str]]:
    """Return the source without duplicates, and a line for each image that was dropped. The first of equal images is kept.

    Reads the whole source once.

    Args:
        run: does the work, see `pipeline.parallel`.
        memory: bytes of images that one task may hold.
    """
    digests = np.zeros(len(source.items), f"V{DIGEST_BYTES}")
    firsts = range(0, len(digests), JOB_IMAGES)
    # `take` and not `slice`: pickling a slice would send the whole table.
    jobs = (
        _DigestJob(
            first,
            source.items.take(np.arange(first, min(first + JOB_IMAGES, len(digests)))),
            source.reader,
            memory,
        )
        for first in firsts
    )
    for first, data in run(_digests_of, jobs):
        digests[first : first + len(data) // DIGEST_BYTES] = np.frombuffer(data, digests.dtype)
    _, first_index, inverse = np.unique(digests, return_index=True, return_inverse=True)
    original = first_index[inverse]  # of each image, the first one with the same digest
    copies = np.flatnonzero(original != np.arange(len(digests)))
    pairs = zip(rows_of(source.items.take(copies)), rows_of(source.items.take(original[copies])), strict=True)
    lines = [f"{copy.describe()} is the same as {other.describe()}" for copy, other in pairs]
    keep = np.ones(len(source.items), np.bool_)
    keep[copies] = False
    return replace(source, items=source.items.filter(pa.array(keep))), lines


def _digests_of(job: _DigestJob) -> tuple[int, bytes]:
    """The number of the job's first image, and the digests of its images, joined."""
    read = job.reader.open()

    def digest(item: Item) -> bytes:
        return hashlib.blake2b(read(item), digest_size=DIGEST_BYTES).digest()

    return job.first, b"".join(map_items(digest, rows_of(job.items), job.reader, job.memory))


def duplicates_in(dataset: Dataset) -> list[str]:
    """Return a line for each sample with the same image as an earlier one. Reads only images of equal size and crc32c."""
    size_and_crc = np.concatenate(
        list(
            map_ahead(lambda shard: _sizes_and_crcs(dataset, shard), range(dataset.manifest.shards), THREADS)
        )
    )
    _, inverse, counts = np.unique(size_and_crc, return_inverse=True, return_counts=True)
    ids = np.flatnonzero(counts[inverse] > 1)
    ids = ids[np.argsort(size_and_crc[ids], kind="stable")]
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


def _sizes_and_crcs(dataset: Dataset, shard: int) -> npt.NDArray[np.uint64]:
    """uint64[samples]: the size of each image in the upper half, its crc32c in the lower half."""
    rows = dataset.index(shard)
    return rows["size"].astype(np.uint64) << np.uint64(32) | rows["crc32c"].astype(np.uint64)
