"""Headers of a tar by ranged reads: the bodies are passed over, and no damage ends a tar silently."""

import tarfile
from collections.abc import Iterator
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import Store

BLOCK = 512
WINDOW = 16 << 10  # bytes of a read after a jump: a header, and the first bytes of the image behind it
MAX_WINDOW = 256 << 10  # of reads that follow each other closely, as in a shard of small images
# S3 answers after 100 to 200 ms and then sends 85 to 90 MB a second (AWS, "Performance design patterns for Amazon S3"),
# so what lies between the headers of a tar of images is there sooner than the answer to another request.
PASSED_WINDOW = 8 << 20
MAX_HEADER = 1 << 20  # long names take a few kB; a header that asks for more than this is damaged
COMPRESSED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
)  # gz bz2 xz zst lz4


class TarDamageError(Exception):
    """A tar cannot be read on; the text says why and from which byte, and fits after the shard's name."""


class RangedFile:
    """One object of a store, or a part of it, as the file that tarfile reads. Holds one window of it in memory.

    Args:
        part: first byte and bytes of the part; all else counts from there.
        window: bytes of a read after a jump.
        digest: of hashlib. Every byte goes through it, in order, and nothing is skipped; reads must then not go
            back beyond the last one.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        digest: Any = None,
        part: tuple[int, int] | None = None,
        window: int = WINDOW,
    ) -> None:
        self.store, self.name, self.digest = store, name, digest
        self.base, self.size = part or (0, store.size(name))
        self.position = 0
        self.start, self.data = 0, b""  # the window
        self.least = self.window = window
        self.met_end = False  # whether a read came back short

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> int:
        self.position = position
        return position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise TarDamageError(f"the header before byte {self.position} is damaged")
        data = self.at(self.position, size)
        self.met_end |= len(data) < size
        self.position += len(data)
        return data

    def at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer where the file ends."""
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        if self.digest is not None:
            self._advance(offset, end)
        elif not self.start <= offset <= end <= self.start + len(self.data):
            near = offset - (self.start + len(self.data)) < WINDOW
            self.window = max(min(2 * self.window, MAX_WINDOW), self.least) if near else self.least
            length = min(max(end - offset, self.window), self.size - offset)
            self.start, self.data = offset, self._read(offset, length)
        return self.data[offset - self.start : end - self.start]

    def _read(self, offset: int, size: int) -> bytes:
        return self.store.read_range(self.name, self.base + offset, size)

    def _advance(self, offset: int, end: int) -> None:
        assert offset >= self.start
        while (held := self.start + len(self.data)) < end:
            piece = self._read(held, min(1 << 20, self.size - held))
            self.digest.update(piece)
            joined = self.data + piece
            drop = min(offset - self.start, len(joined))
            self.start, self.data = self.start + drop, joined[drop:]


def tar_members(file: RangedFile) -> Iterator[tarfile.TarInfo]:
    """Each member's header, in order, then a check of the tar's end.

    Reads GNU, BSD and PAX tars with their long names. TarDamageError where a header is damaged, the tar is cut
    off, or something follows its end. The caller checks that a member's body is there.
    """
    if file.size == 0:
        raise TarDamageError("it is empty")
    tar: tarfile.TarFile | None = None
    end = 0
    while True:
        try:
            if tar is None:
                tar = tarfile.TarFile(fileobj=file, encoding="utf-8")  # type: ignore[arg-type]
            member = tar.next()
            if member is not None and (member.size < 0 or tar.offset <= end):
                raise tarfile.ReadError("a size below zero")
        except (UserError, OSError, TarDamageError):
            raise
        except Exception as error:  # damaged headers make tarfile raise nearly anything
            if file.met_end:
                raise TarDamageError(f"it ends too early, at byte {file.size}") from error
            what = f"the header at byte {end} is damaged" if end else "it is not a tar"
            raise TarDamageError(what) from error
        end = tar.offset
        if member is None:
            break
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        yield member
    _check_end(file, end)


def _check_end(file: RangedFile, end: int) -> None:
    """tarfile stops without a word where a header is damaged or missing: a tar ends with blocks of zeros."""
    block = file.at(end, BLOCK)
    if len(block) < BLOCK:
        raise TarDamageError(f"it ends too early, at byte {file.size} (there is no end mark)")
    if any(block):
        raise TarDamageError(f"the header at byte {end} is damaged")
    position = end + BLOCK
    while rest := file.at(position, WINDOW):
        if used := rest.lstrip(b"\0"):
            at = position + len(rest) - len(used)
            raise TarDamageError(
                f"it goes on at byte {at}, after its end mark at byte {end} (tars joined with cat?)"
            )
        position += len(rest)
