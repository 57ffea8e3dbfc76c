"""Files in a folder or a bucket, through fsspec: atomic writes, and ranged reads with retries.

Transient errors (connection resets, short bodies, time-outs, 5xx, SlowDown) are retried here, because s3fs does not
retry when a body is cut off. Errors that need the user's action (403, a missing bucket, a wrong endpoint) become a
`UserError` that says what to do.
"""

import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from pipeline.errors import UserError
from pipeline.storage.faults import (
    ShortReadError,
    as_user_error,
    is_beyond_end,
    is_fault,
    may_be_checksums,
    s3_error_code,
)
from pipeline.storage.file_systems import (
    ANONYMOUS,
    ATOMIC_SCHEMES,
    READ_ONLY,
    READ_OPTIONS,
    is_folder_marker,
    open_file_system,
    scheme_of,
    without_folder_markers,
)
from pipeline.storage.local_files import file_size, walk

DEADLINE_S = 120  # one operation, with all its retries
STALL_S = 10  # read timeout: no byte for this long in the middle of a response
FIRST_DEADLINE_S = 5  # like DEADLINE_S, until a store has answered once: until then the URL is probably wrong
TEMPORARY = ".maestream-"  # prefix of files that are being written; a killed process may leave some behind
PART_BYTES, PARTS = 8 << 20, 8  # large objects are transferred in parts of this size, this many at once
T = TypeVar("T")
_REACHED: set[str] = set()  # buckets from which this process, or its parent, has had a response
UMASK = os.umask(0)  # reading the process's umask means setting it, so this is done once, at import
os.umask(UMASK)


@dataclass(frozen=True)
class Store:
    """A folder or a bucket prefix. File names are relative to it, with forward slashes."""

    url: str
    fs: Any
    root: str

    @property
    def is_local(self) -> bool:
        return "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, name: str = "") -> str:
        """The path of a file as fsspec expects it: with the folder or bucket, but without the scheme."""
        return f"{self.root}/{name}" if name else self.root

    def describe(self, name: str = "") -> str:
        """The URL or path of a file, for messages."""
        return f"{self.url}/{name}" if name else self.url

    @property
    def bucket(self) -> str:
        return "/".join(self.url.split("/")[:3])  # scheme://bucket

    def read(self, name: str) -> bytes:
        """Read a whole file. FileNotFoundError if it does not exist."""
        with as_user_error(self.describe(name)):
            if self.is_local:
                return self._retry(lambda: Path(self.path(name)).read_bytes())
            # The first part is requested without asking for the size: most objects are no larger.
            timeout_s = self._attempt_timeouts()
            first = self._retry(lambda: self._read_once(name, 0, PART_BYTES, timeout_s()))
            if len(first) == PART_BYTES:
                starts = range(PART_BYTES, size := self.size(name), PART_BYTES)
                with ThreadPoolExecutor(PARTS) as pool:
                    rest = pool.map(lambda a: self.read_range(name, a, min(PART_BYTES, size - a)), starts)
                    return b"".join([first, *rest])
            return first  # longer than a part only if the server ignores ranges: then it is the whole object

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Read exactly `size` bytes from byte `start`.

        FileNotFoundError if the file does not exist, UserError if it ends before the last byte.
        """
        if size == 0:
            return b""  # an empty range is invalid in HTTP, and a server would send the whole object
        timeout_s = self._attempt_timeouts()

        def attempt() -> bytes:
            data = self._read_once(name, start, size, timeout_s())
            self._check_length(name, start, size, len(data))
            return data

        with as_user_error(self.describe(name)):
            return self._retry(attempt)

    def read_into(self, name: str, start: int, memory: memoryview) -> None:
        """Fill `memory` with bytes from byte `start` of a file. Errors as in `read_range`."""
        if not self.is_local:
            memory[:] = self.read_range(name, start, len(memory))
            return

        def attempt() -> None:
            with open(self.path(name), "rb", buffering=0) as file:
                got = os.preadv(file.fileno(), [memory], start)
            self._check_length(name, start, len(memory), got)

        with as_user_error(self.describe(name)):
            self._retry(attempt)

    def _check_length(self, name: str, start: int, size: int, got: int) -> None:
        """ShortReadError if the response was cut off, which is retried. UserError if the file is too short."""
        if got == size:
            return
        if start + size > (actual := int(self.fs.size(self.path(name)))):
            raise UserError(
                f"{self.describe(name)} is shorter than the manifest says: it has {actual} bytes, but byte "
                f"{start + size} was requested. Run `maestream shards verify {self.url}`, then copy or build the dataset "
                "again"
            )
        raise ShortReadError(f"{self.describe(name)}: got {got} of {size} bytes at byte {start}")

    def _attempt_timeouts(self) -> Callable[[], float]:
        """Return a function that gives the timeout, in seconds, of the next attempt of a read that starts now.

        STALL_S does not catch a response that arrives slowly but without a pause, so each attempt has a timeout as well:
        the time left, but at most half and at least an eighth of DEADLINE_S. The minimum lets the last attempt end with
        the store's own error and not with a time-out.
        """
        end = time.monotonic() + max(self._deadline_s(), STALL_S)
        return lambda: max(min(DEADLINE_S / 2, end - time.monotonic()), DEADLINE_S / 8)

    def _read_once(self, name: str, start: int, size: int, timeout: float) -> bytes:
        """Read `size` bytes from byte `start`: fewer if the object ends before, other bytes if the server ignores ranges."""
        if self.is_local:
            with open(self.path(name), "rb", buffering=0) as file:
                return os.pread(file.fileno(), size, start)
        options = {"timeout": timeout} if self.fs.async_impl else READ_OPTIONS.get(scheme_of(self.url), {})
        try:
            return bytes(self.fs.cat_file(self.path(name), start=start, end=start + size, **options))
        except Exception as error:
            if is_beyond_end(error):
                return b""
            raise

    def _deadline_s(self) -> float:
        return DEADLINE_S if self.bucket in _REACHED else FIRST_DEADLINE_S

    def _retry(self, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it succeeds, with exponential backoff, full jitter and a total deadline."""
        begin, deadline_s = time.monotonic(), self._deadline_s()
        patience = tenacity.stop_after_attempt(3) if self.is_local else tenacity.stop_before_delay(deadline_s)

        def gives_up(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            in_vain = may_be_checksums(error) and time.monotonic() - begin > FIRST_DEADLINE_S
            return in_vain or patience(state)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_fault),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
            stop=gives_up,
            reraise=True,
        )
        try:
            result = retrying(attempt)
        except FileNotFoundError:  # this is a response, too
            _REACHED.add(self.bucket)
            raise
        _REACHED.add(self.bucket)
        return result

    def size(self, name: str) -> int:
        """Size of a file in bytes. FileNotFoundError if it does not exist."""
        with as_user_error(self.describe(name)):
            return int(self._retry(lambda: self.fs.size(self.path(name))))

    def modified(self, name: str) -> float:
        """When a file was written, in seconds since 1970. FileNotFoundError if it does not exist."""
        with as_user_error(self.describe(name)):
            return float(self._retry(lambda: self.fs.modified(self.path(name))).timestamp())

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of this name; "" is the store's own folder."""
        with as_user_error(self.describe(name)):
            return self._retry(lambda: self._exists(self.path(name)))

    def _exists(self, path: str) -> bool:
        if self.is_local or scheme_of(self.url) == "s3":
            return bool(self.fs.exists(path))
        try:
            self.fs.info(path)  # fsspec's `exists` takes every error, also of the network, for a missing file
        except FileNotFoundError:
            return False
        return True

    def names(self, prefix: str = "") -> list[str]:
        """Names of all files below the folder `prefix`, sorted; empty if it does not exist. Follows symbolic links.

        UserError if a folder cannot be read.
        """
        if not self.is_local:
            return list(self.sizes(prefix))
        try:
            with as_user_error(self.describe(prefix)):
                return sorted(map(self._name, walk(self.path(prefix))))
        except FileNotFoundError:
            return []

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Size in bytes of each file that `names` lists, in the same order. UserError also for a broken symbolic link."""
        try:
            with as_user_error(self.describe(prefix)):
                root = self.path(prefix)
                if self.is_local:
                    found = {path: file_size(path) for path in walk(root)}
                else:
                    found = without_folder_markers(self._retry(lambda: self._find(root)))
        except FileNotFoundError:
            return {}
        return {self._name(path): found[path] for path in sorted(found)}

    def _find(self, path: str) -> dict[str, int]:
        """Sizes of all objects below a path."""
        details = self.fs.find(path, detail=True)
        return {
            found: int(self.fs.size(found) if detail["size"] is None else detail["size"])
            for found, detail in details.items()
        }

    def entries(self, folders: bool) -> list[str]:
        """Names of the folders, or else of the files, directly in the store, sorted. FileNotFoundError if it does not exist."""
        with as_user_error(self.url):
            found = self._retry(lambda: self.fs.ls(self.root, detail=True))
        folder_names = {self._name(e["name"]).rstrip("/") for e in found if e["type"] == "directory"} - {""}
        if folders:
            return sorted(folder_names)
        files = {self._name(e["name"]): e["size"] for e in found if e["type"] != "directory"}
        return sorted(
            name
            for name, size in files.items()
            if name and not is_folder_marker(name, size) and not (size == 0 and name in folder_names)
        )

    def _name(self, path: str) -> str:
        assert path.startswith(self.root), (path, self.root)
        return path.removeprefix(self.root).lstrip("/")

    @contextmanager
    def _if_writable(self) -> Iterator[None]:
        """Raise UserError if a protocol of fsspec does not write."""
        try:
            yield
        except NotImplementedError as error:
            reason = "write to a local folder or a bucket"
            raise UserError(f"{self.url} can be read, but not written: {reason}") from error

    def check_writable(self) -> None:
        """UserError if nothing can be written to stores of this kind."""
        if reason := READ_ONLY.get(scheme_of(self.url)):
            raise UserError(f"{self.url} can be read, but not written: {reason}")

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file atomically: readers see either all of the old bytes or all of the new ones."""
        with self.staging(name) as temporary:
            temporary.write_bytes(data)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A temporary local file that becomes the file `name` when the block ends without an error."""
        self.check_writable()
        target = self.path(name)
        with as_user_error(self.describe(name)):
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(
                dir=os.path.dirname(target) if self.is_local else None, prefix=TEMPORARY, suffix=".tmp"
            )
        os.close(handle)
        path = Path(temporary)
        try:
            with as_user_error(self.describe(name)):
                yield path
                if self.is_local:
                    path.chmod(0o666 & ~UMASK)  # mkstemp creates files that only their owner may read
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                    path.replace(target)
                else:
                    self._retry(lambda: self._upload(temporary, target))
        finally:
            path.unlink(missing_ok=True)

    def _upload(self, file: str, target: str) -> None:
        """Upload a local file. Readers do not see the object before the upload is complete."""
        scheme = scheme_of(self.url)
        if scheme not in ATOMIC_SCHEMES:  # a file server, or a protocol that only reads
            folder, partial = os.path.dirname(target), f"{os.path.dirname(target)}/{os.path.basename(file)}"
            with self._if_writable():
                self.fs.makedirs(folder, exist_ok=True)
                self.fs.put_file(file, partial)
                self.fs.mv(partial, target)
            return
        if scheme != "s3" or os.path.getsize(file) <= PART_BYTES:
            try:
                self.fs.put_file(file, target)
            except FileNotFoundError as error:
                raise UserError(
                    f"{self.url}: the bucket does not exist: create it, or check its name"
                ) from error
            return
        # s3fs retries a part that fails; our retry would send all parts again.
        fs, _ = open_file_system(self.url, STALL_S, max_concurrency=PARTS)
        try:
            fs.put_file(file, target, chunksize=PART_BYTES)
        except FileNotFoundError as error:
            # s3fs aborts an upload that failed. If the response to the abort is lost, it aborts again and gets NoSuchUpload.
            # The cause is the failed upload, so this is a fault, too.
            if s3_error_code(error) == "NoSuchUpload":
                raise ConnectionError(str(error)) from error
            raise

    def sha256(self, name: str) -> str:
        """SHA-256 of a file as hex digits; reads it in parts. FileNotFoundError if it does not exist."""
        digest = hashlib.sha256()
        size = self.size(name)
        for start in range(0, size, PART_BYTES):
            digest.update(self.read_range(name, start, min(PART_BYTES, size - start)))
        return digest.hexdigest()

    def remove(self, names: list[str]) -> None:
        """Remove files, and local folders that this leaves empty."""
        self.check_writable()
        workers = ThreadPoolExecutor(1 if self.is_local else PARTS)
        with as_user_error(self.url), self._if_writable(), workers as pool:
            list(pool.map(lambda path: self._retry(lambda: self.fs.rm_file(path)), map(self.path, names)))
        if self.is_local:  # object stores have no folders
            for folder in sorted({os.path.dirname(self.path(name)) for name in names}, reverse=True):
                if folder != self.root and os.path.isdir(folder) and not os.listdir(folder):
                    os.rmdir(folder)


def absolute_url(url: str) -> str:
    """Make a local path absolute, and remove slashes at the end of a path or URL."""
    url = url.rstrip("/") or url
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def open_store(url: str, already_reached: bool = False) -> Store:
    """Open a local path or any URL that fsspec supports, such as s3://bucket/prefix with the usual AWS_ variables.
    See `pipeline.storage.file_systems`.

    Args:
        already_reached: whether another process of this run has read or written the store. Then a store that does not
            answer is taken for an outage, and retried for DEADLINE_S. Otherwise the URL is probably wrong, and the
            first operation fails after FIRST_DEADLINE_S.

    UserError if the URL is not valid.
    """
    scheme, _, rest = url.partition("://")
    if scheme_of(url) in ("s3", "gs", "az") and not rest.removeprefix(ANONYMOUS).strip("/"):
        raise UserError(f"{url} has no bucket name: write {scheme}://bucket/prefix")
    url = absolute_url(url)
    fs, root = open_file_system(url, STALL_S)
    if scheme_of(url) == "s3":
        fs.retries = 1  # attempts: `Store` retries
    store = Store(url, fs, root)
    if already_reached:
        _REACHED.add(store.bucket)
    return store


def open_shared(url: str, marker: str) -> Store:
    """Open a store that another process uses, perhaps on another machine.

    UserError if the file `marker` is not in it: then the URL is a local folder of the other machine.
    """
    store = open_store(url, already_reached=True)
    if not store.exists(marker):
        raise UserError(
            f"{store.describe(marker)} does not exist on {platform.node()}: files that several machines use must be on a "
            "shared file system or in a bucket"
        )
    return store
