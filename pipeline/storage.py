"""Files in a folder or a bucket, through fsspec: small atomic writes, ranged reads with retries.

Faults of storage (resets, short bodies, time-outs, 5xx, slow-down) are retried here, on our own ranged
reads, because s3fs does not retry a body that is cut. What only a person can mend (403, a missing bucket,
a wrong endpoint) becomes a `UserError` with a message that says what to do.
"""

import errno
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

import aiohttp
import botocore.exceptions
import botocore.parsers
import fsspec
import tenacity

from pipeline.errors import UserError

DEADLINE_S = 120  # how long one operation is retried in all
STALL_S = 10  # silence in the middle of an answer that is a fault
FIRST_DEADLINE_S = 5  # the same until a store has answered once: a wrong name is likelier than a fault then
TEMPORARY = ".maestream-"  # names of files that are being written begin so; a kill may leave them
PART_BYTES, PARTS = 8 << 20, 8  # of a whole object: their size, and how many are read or sent at once
T = TypeVar("T")
_ANSWERED: set[str] = set()  # buckets that have answered this process
UMASK = os.umask(0)  # the only way to read it is to set it, and it is the whole process's
os.umask(UMASK)


def _s3_options() -> dict[str, Any]:
    return {
        # Objects are immutable here and folders change under us: a cached listing can only be wrong.
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": min(STALL_S, 5),
            "read_timeout": STALL_S,
            "retries": {"max_attempts": 0},  # what is retried is retried here
            "max_pool_connections": 64,  # botocore's 10 would be fewer than the reads under way
        },
    }


class ShortReadError(OSError):
    """Storage returned fewer bytes than were asked for, or more."""


FAULTS = (
    OSError,  # includes ShortReadError, ConnectionError, TimeoutError and what s3fs makes of 5xx
    aiohttp.ClientError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    botocore.parsers.ResponseParserError,  # an answer that is not S3's: of a load balancer, say
)
NOT_FAULTS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def _is_fault(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        return False  # what s3fs makes of a request that is wrong in itself
    return isinstance(error, FAULTS) and not isinstance(error, NOT_FAULTS)


def _code(error: BaseException) -> str | None:
    """What S3 calls it, if s3fs made the error of an answer."""
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code")


@dataclass(frozen=True)
class Store:
    """A folder or a bucket prefix. Names are relative to it, with forward slashes."""

    url: str
    fs: Any
    root: str

    @property
    def is_local(self) -> bool:
        return "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, name: str = "") -> str:
        return f"{self.root}/{name}" if name else self.root

    def describe(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    @property
    def bucket(self) -> str:
        return "/".join(self.url.split("/")[:3])  # scheme://bucket

    def read(self, name: str) -> bytes:
        """The whole of an object. FileNotFoundError where there is none."""
        with explained(self.describe(name)):
            if self.is_local:
                return self._retry(lambda: Path(self.path(name)).read_bytes())
            # The first part without asking for the size: most objects are no larger.
            left = self._clock()
            first = self._retry(lambda: self._read_once(name, 0, PART_BYTES, left()))
            if len(first) == PART_BYTES:
                starts = range(PART_BYTES, size := self.size(name), PART_BYTES)
                with ThreadPoolExecutor(PARTS) as pool:
                    rest = pool.map(lambda a: self.read_range(name, a, min(PART_BYTES, size - a)), starts)
                    return b"".join([first, *rest])
            return first  # longer only where a server ignores ranges: then it is all

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Exactly `size` bytes from byte `start`. FileNotFoundError, or UserError past the end."""
        if size == 0:
            return b""  # a range cannot be empty: it would be the whole object
        left = self._clock()

        def attempt() -> bytes:
            data = self._read_once(name, start, size, left())
            self._check_length(name, start, size, len(data))
            return data

        with explained(self.describe(name)):
            return self._retry(attempt)

    def read_into(self, name: str, start: int, memory: memoryview) -> None:
        """Fill `memory` from byte `start`. Errors as those of `read_range`."""
        if not self.is_local:
            memory[:] = self.read_range(name, start, len(memory))
            return

        def attempt() -> None:
            with open(self.path(name), "rb", buffering=0) as file:
                got = os.preadv(file.fileno(), [memory], start)
            self._check_length(name, start, len(memory), got)

        with explained(self.describe(name)):
            self._retry(attempt)

    def _check_length(self, name: str, start: int, size: int, got: int) -> None:
        """A cut body is a fault and worth a retry; a file that ends here is not."""
        if got == size:
            return
        if start + size > (there := int(self.fs.size(self.path(name)))):
            raise UserError(
                f"{self.describe(name)} is shorter than its manifest says: it has {there} bytes, byte "
                f"{start + size} was asked for. Run `maestream shards verify {self.url}`, then "
                "copy or build it again"
            )
        raise ShortReadError(f"{self.describe(name)}: {got} of {size} bytes at {start}")

    def _clock(self) -> Callable[[], float]:
        """How long one attempt of a read that begins now may take: an answer that trickles in is never silent for
        long enough to be a fault, and may not use up the whole deadline either. The last attempt still gets an
        eighth of it, so that what it ends with is the store's reason, and not that there was no time."""
        end = time.monotonic() + max(self._deadline_s(), STALL_S)
        return lambda: max(min(DEADLINE_S / 2, end - time.monotonic()), DEADLINE_S / 8)

    def _read_once(self, name: str, start: int, size: int, timeout: float) -> bytes:
        """`size` bytes from byte `start`, fewer where the object ends before. More, or others, where a server
        ignores ranges."""
        if self.is_local:
            with open(self.path(name), "rb", buffering=0) as file:
                return os.pread(file.fileno(), size, start)
        limit = {"timeout": timeout} if self.fs.async_impl else {}
        try:
            return self.fs.cat_file(self.path(name), start=start, end=start + size, **limit)
        except OSError as error:
            answer = error.__cause__
            if not isinstance(answer, botocore.exceptions.ClientError):
                raise
            if answer.response["ResponseMetadata"]["HTTPStatusCode"] != 416:
                raise
            return b""  # the object ends before `start`, or there

    def _deadline_s(self) -> float:
        return DEADLINE_S if self.bucket in _ANSWERED else FIRST_DEADLINE_S

    def _retry(self, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it succeeds: exponential waits with full jitter, and a total deadline."""
        deadline_s = self._deadline_s()
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_fault),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
            stop=tenacity.stop_after_attempt(3) if self.is_local else tenacity.stop_before_delay(deadline_s),
            reraise=True,
        )
        try:
            result = retrying(attempt)
        except FileNotFoundError:  # an answer, too
            _ANSWERED.add(self.bucket)
            raise
        _ANSWERED.add(self.bucket)
        return result

    def size(self, name: str) -> int:
        with explained(self.describe(name)):
            return int(self._retry(lambda: self.fs.size(self.path(name))))

    def modified(self, name: str) -> float:
        """When an object was written, in seconds since 1970. FileNotFoundError where there is none."""
        with explained(self.describe(name)):
            return float(self._retry(lambda: self.fs.modified(self.path(name))).timestamp())

    def exists(self, name: str) -> bool:
        with explained(self.describe(name)):
            return bool(self._retry(lambda: self.fs.exists(self.path(name))))

    def names(self, prefix: str = "") -> list[str]:
        """Names of all files below `prefix`, sorted; empty where there is nothing. Symbolic links are
        followed. UserError where a folder may not be read."""
        try:
            with explained(self.describe(prefix)):
                path = self.path(prefix)
                found = list(_walk(path)) if self.is_local else self._retry(lambda: list(self.fs.find(path)))
        except FileNotFoundError:
            return []
        return sorted(map(self._name, found))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The bytes of all files below `prefix`, by name, sorted. Otherwise as `names`. UserError where a file is a link to
        nothing."""
        try:
            with explained(self.describe(prefix)):
                root = self.path(prefix)
                if self.is_local:
                    found = {path: _size(path) for path in _walk(root)}
                else:
                    details = self._retry(lambda: self.fs.find(root, detail=True))
                    found = {path: int(detail["size"]) for path, detail in details.items()}
        except FileNotFoundError:
            return {}
        return {self._name(path): found[path] for path in sorted(found)}

    def entries(self, folders: bool) -> list[str]:
        """Names of the folders, or of the files, right below, sorted. FileNotFoundError where there is nothing."""
        with explained(self.url):
            found = self._retry(lambda: self.fs.ls(self.root, detail=True))
        return sorted(
            self._name(e["name"]).rstrip("/") for e in found if (e["type"] == "directory") == folders
        )

    def _name(self, path: str) -> str:
        return path.removeprefix(self.root).lstrip("/")

    def write(self, name: str, data: bytes) -> None:
        """Create or replace an object: readers see the old bytes or the new, nothing between."""
        with self.staging(name) as temporary:
            temporary.write_bytes(data)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A temporary local file that becomes `name` when the block ends without an error."""
        target = self.path(name)
        with explained(self.describe(name)):
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(
                dir=os.path.dirname(target) if self.is_local else None, prefix=TEMPORARY, suffix=".tmp"
            )
        os.close(handle)
        path = Path(temporary)
        try:
            with explained(self.describe(name)):
                yield path
                if self.is_local:
                    path.chmod(0o666 & ~UMASK)  # mkstemp makes files that nobody else may read
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                    path.replace(target)
                else:
                    self._retry(lambda: self._upload(temporary, target))
        finally:
            path.unlink(missing_ok=True)

    def _upload(self, file: str, target: str) -> None:
        """No reader sees the object before all of it is there."""
        if not self.url.startswith("s3://") or os.path.getsize(file) <= PART_BYTES:
            self.fs.put_file(file, target)
            return
        # A part that fails is sent again by s3fs itself: our retry sends all of them.
        fs = fsspec.filesystem("s3", max_concurrency=PARTS, **_s3_options())
        try:
            fs.put_file(file, target, chunksize=PART_BYTES)
        except FileNotFoundError as error:
            # s3fs takes back an upload that it gives up. If the answer to that is lost and it asks again, the upload is what is
            # not there any more: a fault like the one before.
            if _code(error) == "NoSuchUpload":
                raise ConnectionError(str(error)) from error
            raise

    def sha256(self, name: str) -> str:
        """Of all of an object, read in parts. FileNotFoundError where there is none."""
        digest = hashlib.sha256()
        size = self.size(name)
        for start in range(0, size, PART_BYTES):
            digest.update(self.read_range(name, start, min(PART_BYTES, size - start)))
        return digest.hexdigest()

    def remove(self, names: list[str]) -> None:
        with explained(self.url), ThreadPoolExecutor(1 if self.is_local else PARTS) as pool:
            list(pool.map(lambda path: self._retry(lambda: self.fs.rm_file(path)), map(self.path, names)))
        if self.is_local:  # folders are real here
            for folder in sorted({os.path.dirname(self.path(name)) for name in names}, reverse=True):
                if folder != self.root and os.path.isdir(folder) and not os.listdir(folder):
                    os.rmdir(folder)


def whole_url(url: str) -> str:
    """A local path from the root on, whoever reads it and from where; other URLs as they are, without slashes at the end."""
    url = url.rstrip("/") or url
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def open_store(url: str, known: bool = False) -> Store:
    """A store for a local path or any URL fsspec knows (s3://bucket/prefix with the usual AWS variables).

    `known`: it has answered the process that started this one, so silence is an outage, not a wrong name.
    """
    if url.startswith("s3://") and not url.removeprefix("s3://").strip("/"):
        raise UserError(f"{url} names no bucket: write s3://bucket/prefix")
    url = whole_url(url)
    try:
        fs, root = fsspec.core.url_to_fs(url, **(_s3_options() if url.startswith("s3://") else {}))
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}") from error
    if url.startswith("s3://"):
        fs.retries = 1  # what is retried is retried here
    store = Store(url, fs, root)
    if known:
        _ANSWERED.add(store.bucket)
    return store


def open_shared(url: str, marker: str) -> Store:
    """A store that another process has told of. UserError where `marker` is not in it: then that process is on another
    machine, and meant a folder there."""
    store = open_store(url, known=True)
    if not store.exists(marker):
        raise UserError(
            f"{store.describe(marker)} is not there on {platform.node()}: what many machines work on has to be on a file "
            "system that they share, or in a bucket"
        )
    return store


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(
            f"{path} is a link to nothing, or has just gone: remove it, or run this again"
        ) from None


def _walk(folder: str) -> Iterator[str]:
    """Paths of all files below a local folder. FileNotFoundError, or what keeps a folder from being read."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        above = os.path.realpath(root) + os.sep
        # A link to a folder above would be walked for ever.
        folders[:] = [
            f for f in folders if not above.startswith(os.path.realpath(os.path.join(root, f)) + os.sep)
        ]
        yield from (os.path.join(root, name) for name in files)


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn what only a person can mend into one message. FileNotFoundError is left to the caller."""
    try:
        yield
    except FileNotFoundError as error:
        if "bucket does not exist" in str(error):  # what S3 says of NoSuchBucket
            raise UserError(f"{where}: there is no such bucket: create it, or check its name") from error
        raise
    except (*FAULTS, ValueError, botocore.exceptions.BotoCoreError) as error:
        if isinstance(error, ValueError) and "Invalid endpoint" not in str(error):
            raise
        raise UserError(f"{where}: {_advice(error, where.startswith('s3://'))}") from error


def _advice(error: Exception, s3: bool) -> str:
    """What an error of storage means, and what to do."""
    what = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TimeoutError) and not str(error):
        what = "no whole answer in time"
    number = getattr(error, "errno", None)
    if isinstance(error, PermissionError):
        return f"access refused ({what}). Check " + (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if s3 else "its owner and mode"
        )
    if isinstance(error, NotADirectoryError | FileExistsError):
        return "a part of that path is a file, not a folder"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "no space left: free some, and run it again"
    if "bucket is not valid" in what:
        return "that cannot be a bucket's name"
    if "Credential" in type(error).__name__:
        return f"no S3 keys ({what}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if s3:
        return f"the store does not answer as it should ({what}). Check AWS_ENDPOINT_URL, AWS_PROFILE and the network"
    return f"cannot be read or written ({what})"
