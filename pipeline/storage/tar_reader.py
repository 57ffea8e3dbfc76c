"""Read the headers of a tar with ranged reads, without its contents. Damage is always reported.

A tar is a sequence of members. Each is a 512-byte header with name and size, followed by the file's bytes, padded to a
multiple of 512. Long names take additional headers. The end mark is two blocks of zeros, followed by zeros only.
`tarfile` treats a damaged header, or a missing end mark, as the end of the tar; here both are errors.
"""

import tarfile
from collections.abc import Iterator

from pipeline.errors import UserError
from pipeline.storage.ranged_file import WINDOW, RangedFile

BLOCK = 512
# Bytes per request when the headers of a tar of images are read from a bucket. S3 answers after 100 to 200 ms and then
# sends 85 to 90 MB/s (AWS, "Performance design patterns for Amazon S3"), so reading through the images is faster than
# one request per header.
BUCKET_WINDOW = 8 << 20
MAX_HEADER = 1 << 20  # long names take a few kB; a header that asks for more than this is damaged
COMPRESSED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
)  # first bytes of gz, bz2, xz, zst and lz4


class TarDamageError(Exception):
    """A tar is damaged. The text says how and at which byte, and is made to follow the tar's name and a colon."""


class _HeaderFile:
    """The file that `tarfile` gets: it refuses a size that only a damaged header asks for, and notes a short read."""

    def __init__(self, file: RangedFile) -> None:
        self.file = file
        self.was_short = False

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise TarDamageError(f"the header before byte {self.tell()} is damaged")
        data = self.file.read(size)
        self.was_short |= len(data) < size
        return data


def tar_members(file: RangedFile) -> Iterator[tarfile.TarInfo]:
    """Yield the header of each member in order, then check the end of the tar.

    Reads GNU, BSD and PAX tars with long names. TarDamageError if a header is damaged, the tar is cut off, or anything
    follows its end mark. The caller checks that each member's bytes are in the file.
    """
    if file.size == 0:
        raise TarDamageError("the file is empty")
    headers = _HeaderFile(file)
    tar: tarfile.TarFile | None = None
    end = 0
    while True:
        try:
            if tar is None:
                tar = tarfile.TarFile(fileobj=headers, encoding="utf-8")  # type: ignore[arg-type]
            member = tar.next()
            if member is not None and (member.size < 0 or tar.offset <= end):
                raise tarfile.ReadError("a negative size")
        except (UserError, OSError, TarDamageError):
            raise
        except Exception as error:  # on a damaged header tarfile raises almost any exception
            if headers.was_short:
                raise TarDamageError(f"the tar is cut off at byte {file.size}") from error
            what = f"the header at byte {end} is damaged" if end else "it is not a tar file"
            raise TarDamageError(what) from error
        end = tar.offset
        if member is None:
            break
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        yield member
    _check_end(file, end)


def _check_end(file: RangedFile, end: int) -> None:
    """Check that the end mark is at byte `end`, and that only zeros follow it."""
    block = file.read_at(end, BLOCK)
    if len(block) < BLOCK:
        raise TarDamageError(f"the tar is cut off at byte {file.size} (it has no end mark)")
    if any(block):
        raise TarDamageError(f"the header at byte {end} is damaged")
    position = end + BLOCK
    while rest := file.read_at(position, WINDOW):
        if used := rest.lstrip(b"\0"):
            at = position + len(rest) - len(used)
            raise TarDamageError(
                f"data follows at byte {at}, after the end mark at byte {end} (were tars joined with cat?)"
            )
        position += len(rest)
