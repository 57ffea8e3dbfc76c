"""An object of a store as a read-only file, for `tarfile` and for Parquet's reader."""

import io
from typing import Any

from pipeline.storage.store import Store

WINDOW = 16 << 10  # bytes per request after a seek: a tar header and the first bytes of the image after it
MAX_WINDOW = (
    256 << 10
)  # bytes per request while reads follow each other closely, as in a shard of small images
DIGEST_PART = 1 << 20  # bytes per request when every byte is read


class RangedFile(io.RawIOBase):
    """An object of a store, or a part of it, as a seekable read-only file.

    Each request reads a window, so that small reads near each other need few requests. The window is kept in memory and
    doubles, up to MAX_WINDOW, while reads follow each other closely.

    Args:
        digest: a hashlib object. It is updated with every byte in order, without gaps. Reads must then not go back to
            before the previous read.
        part: (first byte, size in bytes) of the part to read. Positions count from its first byte.
        window: smallest number of bytes per request. 0 reads exactly what is asked for.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        digest: Any = None,
        part: tuple[int, int] | None = None,
        window: int = WINDOW,
    ) -> None:
        super().__init__()
        self.store, self.name, self.digest = store, name, digest
        self.base, self.size = part or (0, store.size(name))
        self.position = 0
        self.min_window = self.window = window
        self.start, self.data = 0, b""  # position and bytes of the window in memory

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        data = self.read_at(self.position, self.size if size < 0 else size)
        self.position += len(data)
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer where the file ends. Does not change the position."""
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        if self.digest is not None:
            self._read_until(offset, end)
        elif not self.start <= offset <= end <= self.start + len(self.data):
            is_near = offset - (self.start + len(self.data)) < WINDOW
            self.window = (
                max(min(2 * self.window, MAX_WINDOW), self.min_window) if is_near else self.min_window
            )
            length = min(max(end - offset, self.window), self.size - offset)
            self.start, self.data = offset, self._request(offset, length)
        return self.data[offset - self.start : end - self.start]

    def _request(self, offset: int, size: int) -> bytes:
        return self.store.read_range(self.name, self.base + offset, size)

    def _read_until(self, offset: int, end: int) -> None:
        """Read and digest all bytes up to `end`; keep those from `offset` on."""
        assert offset >= self.start
        while (held := self.start + len(self.data)) < end:
            part = self._request(held, min(DIGEST_PART, self.size - held))
            self.digest.update(part)
            joined = self.data + part
            drop = min(offset - self.start, len(joined))
            self.start, self.data = self.start + drop, joined[drop:]
