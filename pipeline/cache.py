"""The kept part of a dataset: a fixed set of chunks in a folder that the workers of a node share.

An epoch passes over the whole dataset once, so the best that a cache of a given size can do is to hold a
fixed part of it. Which chunks are kept is a function of their number alone, and there are as many of them
as the bound allows: no eviction, no coordination. A chunk lands under a temporary name and is renamed.

    FOLDER/maestream-<dataset>-<chunks>/       one dataset under one bound; others that nobody uses are removed
        <shard>/<chunk>                        CHUNK_BYTES of a shard, its last one may be shorter
        .maestream-tmp/<shard>-<chunk>         being written
        .maestream-lock                        held (shared) by whoever uses the folder
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage import TEMPORARY

CHUNK_BYTES = 1 << 20
LOCK, BEING_WRITTEN = TEMPORARY + "lock", TEMPORARY + "tmp"
OURS = re.compile(r"maestream-[0-9a-f]{16}-\d+")


@dataclass(frozen=True)
class KeptPart:
    """Which chunks are kept, and where.

    Args:
        folder: of this dataset under this bound, see `open_kept_part`.
        kept: how many chunks are kept, of
        chunks: all that the dataset has.
        chunk_bytes: their size.
    """

    folder: str
    kept: int
    chunks: int
    chunk_bytes: int = CHUNK_BYTES

    def keeps(self, chunk: int) -> bool:
        """Whether chunk number `chunk`, counted over the whole dataset, is kept: `kept` of them are, evenly
        spread, so that every block finds the same share of itself here."""
        return (chunk + 1) * self.kept // self.chunks > chunk * self.kept // self.chunks

    def path(self, shard: int, chunk: int) -> Path:
        """Where chunk number `chunk` of shard number `shard` is kept."""
        return Path(self.folder, f"{shard:07d}", f"{chunk:06d}")

    def read(self, shard: int, chunk: int, start: int, memory: memoryview) -> bool:
        """Fill `memory` from byte `start` of a kept chunk; False where it is not there, or not whole."""
        try:
            with self.path(shard, chunk).open("rb", buffering=0) as file:
                return os.preadv(file.fileno(), [memory], start) == len(memory)
        except OSError:
            return False

    def write(self, shard: int, chunk: int, data: memoryview) -> None:
        """Keep a chunk. OSError where the disk is full, or the folder may not be written."""
        path = self.path(shard, chunk)
        temporary = Path(self.folder, BEING_WRITTEN, f"{shard}-{chunk}")
        try:
            file = temporary.open("xb", buffering=0)
        except FileExistsError:
            return  # another worker is at it; so the folder never holds a chunk twice
        try:
            with file:
                file.write(data)
            path.parent.mkdir(exist_ok=True)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def forget(self, shard: int, chunk: int) -> None:
        """Remove a chunk that turned out to be damaged."""
        self.path(shard, chunk).unlink(missing_ok=True)


@contextlib.contextmanager
def open_kept_part(
    folder: str, bound_bytes: int, identity: str, chunks: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[KeptPart]:
    """The kept part of the dataset with this `identity` (hex digits) and number of chunks, at most
    `bound_bytes`, in use until the context ends. Clears away what other datasets, other bounds and killed
    processes left in the folder, if nobody uses it. OSError where it cannot be written.
    """
    kept = min(bound_bytes // chunk_bytes, chunks)
    part = KeptPart(str(Path(folder, f"maestream-{identity[:16]}-{kept}")), kept, chunks, chunk_bytes)
    own = Path(part.folder)
    being_written = own / BEING_WRITTEN
    being_written.mkdir(parents=True, exist_ok=True)
    for other in Path(folder).iterdir():
        if other != own and OURS.fullmatch(other.name):
            with _unused(other) as unused:
                if unused:
                    shutil.rmtree(other, ignore_errors=True)
    with _unused(own) as unused:
        if unused:
            for path in being_written.iterdir():
                path.unlink(missing_ok=True)
    with (own / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield part


@contextlib.contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Whether no process uses a folder; none can begin to until the context ends."""
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
