"""The disk cache: a fixed set of chunks of a dataset, in a folder that the workers of a node share.

A chunk is CHUNK_BYTES (1 MiB) of a shard, aligned; the last chunk of a shard may be shorter. Each epoch reads the whole
dataset once, so no cache of a given size can do better than to hold a fixed part of it. Which chunks that is depends
only on their number and on the size of the cache, as many as fit. So there is no eviction, and workers need not
coordinate. A chunk is written under a temporary name and then renamed, so a reader never finds half of one.

    FOLDER/maestream-<dataset>-<chunks>/       one dataset with one cache size; unused ones of others are removed
        <shard>/<chunk>                        a chunk
        .maestream-tmp/<shard>-<chunk>         a chunk that is being written
        .maestream-lock                        locked (shared) by every process that uses the folder
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage.store import TEMPORARY

CHUNK_BYTES = 1 << 20
LOCK, BEING_WRITTEN = TEMPORARY + "lock", TEMPORARY + "tmp"
CACHE_FOLDER = re.compile(r"maestream-[0-9a-f]{16}-\d+")


@dataclass(frozen=True)
class DiskCache:
    """Which chunks are cached, and where. Chunks are numbered within their shard, or over the whole dataset.

    Args:
        folder: for this dataset and cache size, see `open_disk_cache`.
        num_cached: number of chunks that the cache holds when it is full.
        num_chunks: number of chunks of the whole dataset.
        chunk_bytes: size of a chunk.
    """

    folder: str
    num_cached: int
    num_chunks: int
    chunk_bytes: int = CHUNK_BYTES

    def holds(self, chunk: int) -> bool:
        """Whether the chunk with this number over the whole dataset belongs to the cache. Cached chunks are evenly
        spread, so that about the same share of every block is cached."""
        before = chunk * self.num_cached // self.num_chunks
        return (chunk + 1) * self.num_cached // self.num_chunks > before

    def path(self, shard: int, chunk: int) -> Path:
        """The file of chunk number `chunk` of shard number `shard`."""
        return Path(self.folder, f"{shard:07d}", f"{chunk:06d}")

    def read(self, shard: int, chunk: int, start: int, memory: memoryview) -> bool:
        """Fill `memory` from byte `start` of a chunk. False if the chunk is not there or too short."""
        try:
            with self.path(shard, chunk).open("rb", buffering=0) as file:
                return os.preadv(file.fileno(), [memory], start) == len(memory)
        except OSError:
            return False

    def write(self, shard: int, chunk: int, data: memoryview) -> None:
        """Write a chunk. OSError if the disk is full or the folder is not writable."""
        path = self.path(shard, chunk)
        temporary = Path(self.folder, BEING_WRITTEN, f"{shard}-{chunk}")
        try:
            file = temporary.open("xb", buffering=0)
        except FileExistsError:
            return  # another worker is writing it; so no chunk is ever stored twice
        try:
            with file:
                file.write(data)
            path.parent.mkdir(exist_ok=True)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self, shard: int, chunk: int) -> None:
        """Remove a damaged chunk."""
        self.path(shard, chunk).unlink(missing_ok=True)


@contextlib.contextmanager
def open_disk_cache(
    folder: str, max_bytes: int, identity: str, num_chunks: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[DiskCache]:
    """The cache of one dataset, locked for use until the context ends.

    Removes leftovers in `folder` that no process uses: caches of other datasets or other sizes, and partial files of
    killed processes.

    Args:
        folder: shared by the workers of a node.
        max_bytes: size of the cache.
        identity: of the dataset, hexadecimal digits.
        num_chunks: number of chunks of the dataset.

    Raises OSError if the folder is not writable.
    """
    num_cached = min(max_bytes // chunk_bytes, num_chunks)
    name = f"maestream-{identity[:16]}-{num_cached}"
    cache = DiskCache(str(Path(folder, name)), num_cached, num_chunks, chunk_bytes)
    own = Path(cache.folder)
    being_written = own / BEING_WRITTEN
    being_written.mkdir(parents=True, exist_ok=True)
    for other in Path(folder).iterdir():
        if other != own and CACHE_FOLDER.fullmatch(other.name):
            with _lock_if_unused(other) as unused:
                if unused:
                    shutil.rmtree(other, ignore_errors=True)
    with _lock_if_unused(own) as unused:
        if unused:
            for path in being_written.iterdir():
                path.unlink(missing_ok=True)
    with (own / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield cache


@contextlib.contextmanager
def _lock_if_unused(folder: Path) -> Iterator[bool]:
    """Whether no process uses a folder. If so, no process can start to use it until the context ends."""
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
