"""Read weight files from untrusted sources: within a size limit, and without running code from them.

The first bytes tell the format, not the file's name: safetensors, or a file of `torch.save`. The latter is a pickle, which is
read with `weights_only=True`: it may only contain tensors and plain values. One class more is allowed, `argparse.Namespace`:
the MAE authors' training checkpoints contain it, and it is no more than a dictionary.
"""

import argparse
import hashlib
import pickle
import re
import resource
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp
import fsspec
import tenacity
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.secrets import without_secrets
from pipeline.storage.faults import FAULTS, NOT_FAULTS, as_user_error
from pipeline.storage.store import PART_BYTES, STALL_S, Store, open_store

# Largest file, and largest total size of its tensors. A ViT-H training checkpoint with AdamW's moments has 8 GB.
MAX_BYTES = 16 << 30
EXTRA_BYTES = 2 << 30  # memory that reading a file may take in addition to twice the file's size
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WRAPPER_KEYS = ("model", "state_dict")  # where checkpoints of the MAE authors and of timm have the weights
GET_ANOTHER = "download it again, or use another file"
IS_PROGRAM = (
    "is an exported program, which cannot be imported: use a safetensors or authors export of the model"
)


@dataclass(frozen=True)
class WeightFile:
    """Content of a weight file."""

    tensors: dict[str, torch.Tensor]  # by the file's own names; floats, all finite
    extras: dict[str, Any] = field(default_factory=dict)  # other values of a torch.save file
    sha256: str = ""


def is_http(location: str) -> bool:
    """Return whether a location is an http or https URL."""
    return location.startswith(("http://", "https://"))


def read_weight_file(url: str) -> WeightFile:
    """Read all tensors of a file in a folder, in a bucket or on the web (http, https).

    Raises:
        UserError: the file is larger than MAX_BYTES, contains code, is damaged or truncated, or has weights that are not
            finite floats; or it is an exported program (ONNX, torch.export).
        FileNotFoundError: there is no such file.
    """
    where = without_secrets(url)
    with _local_copy(url) as path:
        with as_user_error(where), path.open("rb") as file:
            head = file.read(9)
        if not head:
            raise UserError(f"{where} is empty: {GET_ANOTHER}")
        if (
            head[:4] == b"PK\x03\x04" or head[0] == 0x80
        ):  # torch.save: a zip, or, in old versions, a bare pickle
            content = _read_torch_file(path, where)
        elif head[8:] == b"{":  # safetensors: 8 bytes of header length, then a JSON object
            content = WeightFile(_read_safetensors(path, where))
        elif url.endswith((".onnx", ".onnx.data")):  # ONNX has no magic number
            raise UserError(f"{where} {IS_PROGRAM}")
        else:
            raise UserError(f"{where} is not a weight file: expected safetensors or a file of torch.save")
        _check_tensors(content.tensors, where)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    return WeightFile(content.tensors, content.extras, digest.hexdigest())


def _read_safetensors(path: Path, where: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, KeyError, MemoryError) as error:  # KeyError: a dtype that torch does not have
        raise UserError(f"{where} is damaged or truncated ({error}): {GET_ANOTHER}") from None


def _read_torch_file(path: Path, where: str) -> WeightFile:
    tree = _unpickle(path, where)
    weights = tree
    if isinstance(tree, dict):
        weights = next((tree[key] for key in WRAPPER_KEYS if isinstance(tree.get(key), dict)), tree)
    if not isinstance(weights, dict):
        raise UserError(
            f"{where} contains a {type(weights).__name__}, expected a dictionary of named tensors"
        )
    if weights is tree:
        return WeightFile(weights)
    return WeightFile(weights, {key: value for key, value in tree.items() if value is not weights})


def _unpickle(path: Path, where: str) -> Any:
    """Load a torch.save file without running code from it. Raise UserError if that is not possible."""
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                # `torch.export.save` adds this file.
                if any(part.endswith("/archive_format") for part in archive.namelist()):
                    raise UserError(f"{where} {IS_PROGRAM}")
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise UserError(
                        f"{where} is refused: it is a compressed archive, and torch.save never compresses"
                    )
        with torch.serialization.safe_globals([argparse.Namespace]), _memory_limit(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it names {named[1]}, which could run code"
            if named
            else "its pickle is damaged, or contains more than weights"
        )
        raise UserError(
            f"{where} is refused, and no code in it was run: {reason}. Ask its author for a safetensors file"
        ) from None
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{where} is refused: it asks for far more memory than its weights need") from None
    except Exception as error:  # torch raises nearly any exception on damaged files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{where} is damaged or truncated ({reason}): {GET_ANOTHER}") from None


@contextmanager
def _memory_limit(path: Path) -> Iterator[None]:
    """Limit this process's memory while a file is read (Linux only).

    A pickle of a few bytes can ask for any amount of memory. With the limit that raises MemoryError at once.
    """
    status = Path("/proc/self/status")
    used = re.search(r"VmData:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = (int(used[1]) << 10) + 2 * path.stat().st_size + EXTRA_BYTES
    others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bound, *others) if others else bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _check_tensors(tensors: dict[str, Any], where: str) -> None:
    """Raise UserError unless all values are finite float tensors.

    Sizes are checked before anything is copied: a tensor may claim to be larger than its file.
    """
    if not tensors:
        raise UserError(f"{where} contains no weights")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{where}: {str(name)[:80]} is a {type(tensor).__name__}, not a tensor: {GET_ANOTHER}"
            )
        if (
            not isinstance(name, str)
            or tensor.dtype not in FLOATS
            or tensor.layout != torch.strided
            or tensor.is_meta
        ):
            raise UserError(
                f"{where}: {str(name)[:80]} has the wrong type ({tensor.dtype}): weights must be dense float tensors"
            )
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > MAX_BYTES:
        raise UserError(f"{where} is refused: it claims more than {MAX_BYTES >> 30} GiB of weights")
    if broken := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(f"{where} has weights that are not finite ({broken[0]}{more}): {GET_ANOTHER}")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all elements are finite. `aminmax` needs no copy, and returns NaN if any element is NaN."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


@contextmanager
def _local_copy(url: str) -> Iterator[Path]:
    """Yield the path of the file on the local disk; a download is deleted after the block."""
    if is_http(url):
        with tempfile.NamedTemporaryFile(prefix="maestream-") as file:
            _download(url, file)
            yield Path(file.name)
        return
    store, name = split_path(url)
    size = store.size(name)
    if size > MAX_BYTES:
        raise UserError(
            f"{store.describe(name)} is refused: it has {size:,} bytes, more than {MAX_BYTES >> 30} GiB"
        )
    if store.is_local:
        yield Path(store.path(name))
        return
    with tempfile.NamedTemporaryFile(prefix="maestream-") as file, as_user_error(file.name):
        for start in range(0, size, PART_BYTES):
            file.write(store.read_range(name, start, min(PART_BYTES, size - start)))
        file.flush()
        yield Path(file.name)


def split_path(url: str) -> tuple[Store, str]:
    """Split a file's URL into the store of its folder and its name in it."""
    folder, _, name = open_store(url).url.rpartition("/")
    return open_store(folder or "/"), name


def _download(url: str, file: IO[bytes]) -> None:
    """Download from the web; after a broken connection start again from the beginning, at most three times in all."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=3 * STALL_S)
    fs = fsspec.filesystem("http", client_kwargs={"timeout": timeout}, use_listings_cache=False)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, FAULTS) and not isinstance(e, NOT_FAULTS)),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
        stop=tenacity.stop_after_attempt(3),
        reraise=True,
    )

    def attempt() -> None:
        file.seek(0)
        file.truncate()
        # block_size 0 streams the body instead of ranges. Without a size fsspec would ask for it first, and would report
        # any failure of that request as a missing file.
        with fs.open(url, "rb", block_size=0, size=1) as page:
            while part := page.read(PART_BYTES):
                if file.tell() + len(part) > MAX_BYTES:
                    raise UserError(
                        f"{without_secrets(url)} is refused: it has more than {MAX_BYTES >> 30} GiB"
                    )
                file.write(part)
        file.flush()

    try:
        with as_user_error(without_secrets(url)):
            retrying(attempt)
    except UserError as error:
        raise UserError(without_secrets(str(error))) from None
