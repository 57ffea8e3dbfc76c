"""Files of weights that others made: fetched within bounds, and read without running anything in them.

What a file is, its first bytes say, and not its name: safetensors, or what `torch.save` writes. The latter is a pickle, of
which torch's own reader builds tensors and plain values alone (`weights_only=True`); one thing more is allowed,
`argparse.Namespace`, which the authors' training checkpoints have in them and which is no more than a dictionary.
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
from pipeline.storage import FAULTS, NOT_FAULTS, PART_BYTES, STALL_S, Store, explained, open_store

MOST_BYTES = (
    16 << 30
)  # of a file, and of what is in it: a ViT-H's training checkpoint with AdamW's moments has 8 GB
SPARE_BYTES = 2 << 30  # that reading a file may take besides twice what it has
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WRAPPED_IN = ("model", "state_dict")  # where checkpoints of the authors and of timm have the weights
ANOTHER = "get the file again, or another"


@dataclass(frozen=True)
class WeightFile:
    """What is in a file of weights."""

    tensors: dict[str, torch.Tensor]  # by the names that the file gives them; floats, all finite
    beside: dict[str, Any] = field(default_factory=dict)  # what a file of torch.save has beside its weights
    sha256: str = ""


def is_http(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def read_weight_file(url: str) -> WeightFile:
    """All weights of a file in a folder, in a bucket or on the web (http, https).

    UserError, with the reason, where it is larger than MOST_BYTES, holds code, is damaged or cut
    short, or has weights that are no finite floats. FileNotFoundError where there is none.
    """
    where = without_secrets(url)
    with _fetched(url) as path:
        with explained(where), path.open("rb") as file:
            head = file.read(9)
        if not head:
            raise UserError(f"{where} is empty: {ANOTHER}")
        if (
            head[:4] == b"PK\x03\x04" or head[0] == 0x80
        ):  # zip, as torch.save writes; or a bare pickle, as it did before
            found = _torch_file(path, where)
        elif head[8:] == b"{":  # after the length of the header
            found = WeightFile(_safetensors(path, where))
        else:
            raise UserError(f"{where} is no file of weights: neither safetensors nor of torch.save")
        _check_tensors(found.tensors, where)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    return WeightFile(found.tensors, found.beside, digest.hexdigest())


def _safetensors(path: Path, where: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, KeyError, MemoryError) as error:  # KeyError: of a dtype that torch does not have
        raise UserError(f"{where} is damaged or cut short ({error}): {ANOTHER}") from None


def _torch_file(path: Path, where: str) -> WeightFile:
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise UserError(
                        f"{where} is a compressed archive, which torch.save does not write: refused"
                    )
        with torch.serialization.safe_globals([argparse.Namespace]), _bounded(path):
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"it names {named[1]}, which could run code"
            if named
            else "its pickle is damaged, or more than weights"
        )
        raise UserError(
            f"{where} is refused, nothing in it was run: {what}. Ask for it as safetensors"
        ) from None
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{where} asks for far more memory than it has weights: refused") from None
    except Exception as error:  # torch's reader raises nearly anything on damaged bytes
        said = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{where} is damaged or cut short ({said}): {ANOTHER}") from None
    weights = next(
        (tree[k] for k in WRAPPED_IN if isinstance(tree, dict) and isinstance(tree.get(k), dict)), tree
    )
    if not isinstance(weights, dict):
        raise UserError(f"{where} has no weights by their names in it, it is a {type(weights).__name__}")
    beside = (
        {key: value for key, value in tree.items() if value is not weights} if weights is not tree else {}
    )
    return WeightFile(weights, beside)


@contextmanager
def _bounded(path: Path) -> Iterator[None]:
    """A few bytes of a pickle can ask for any number of them: on Linux, MemoryError then, before the machine has none left."""
    status = Path("/proc/self/status")
    found = re.search(r"VmData:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = (int(found[1]) << 10) + 2 * path.stat().st_size + SPARE_BYTES
    others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bound, *others) if others else bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _check_tensors(tensors: dict[str, Any], where: str) -> None:
    """UserError for what is no weight. Before anything is copied: a tensor may claim to be larger than its file."""
    if not tensors:
        raise UserError(f"{where} has no weights in it")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{where}: {str(name)[:80]} is a {type(tensor).__name__}, not a tensor: {ANOTHER}"
            )
        if (
            not isinstance(name, str)
            or tensor.dtype not in FLOATS
            or tensor.layout != torch.strided
            or tensor.is_meta
        ):
            raise UserError(
                f"{where}: {str(name)[:80]} has the wrong type ({tensor.dtype}), weights are floats"
            )
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > MOST_BYTES:
        raise UserError(f"{where} claims more than {MOST_BYTES >> 30} GiB of weights: refused")
    if broken := [name for name, tensor in tensors.items() if not _finite(tensor)]:
        more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(f"{where} has weights that are not finite ({broken[0]}{more}): {ANOTHER}")


def _finite(tensor: torch.Tensor) -> bool:
    """NaN is both the least and the largest of numbers that it is among."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


@contextmanager
def _fetched(url: str) -> Iterator[Path]:
    """The file on this machine's disk, as long as the block lasts."""
    if is_http(url):
        with tempfile.NamedTemporaryFile(prefix="maestream-") as file:
            _download(url, file)
            yield Path(file.name)
        return
    store, name = beside(url)
    size = store.size(name)
    if size > MOST_BYTES:
        raise UserError(
            f"{store.describe(name)} has {size:,} bytes, more than {MOST_BYTES >> 30} GiB: refused"
        )
    if store.is_local:
        yield Path(store.path(name))
        return
    with tempfile.NamedTemporaryFile(prefix="maestream-") as file, explained(file.name):
        for start in range(0, size, PART_BYTES):
            file.write(store.read_range(name, start, min(PART_BYTES, size - start)))
        file.flush()
        yield Path(file.name)


def beside(url: str) -> tuple[Store, str]:
    """The store that a file lies in, and its name there."""
    folder, _, name = open_store(url).url.rpartition("/")
    return open_store(folder or "/"), name


def _download(url: str, file: IO[bytes]) -> None:
    """A page of the web, from its beginning again where the connection breaks."""
    patience = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=3 * STALL_S)
    fs = fsspec.filesystem("http", client_kwargs={"timeout": patience}, use_listings_cache=False)
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, FAULTS) and not isinstance(e, NOT_FAULTS)),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
        stop=tenacity.stop_after_attempt(3),
        reraise=True,
    )

    def attempt() -> None:
        file.seek(0)
        file.truncate()
        # 0: as it comes, not in ranges. Without a size it would be asked for first, and any trouble then be a missing file.
        with fs.open(url, "rb", block_size=0, size=1) as page:
            while part := page.read(PART_BYTES):
                if file.tell() + len(part) > MOST_BYTES:
                    raise UserError(f"{without_secrets(url)} has more than {MOST_BYTES >> 30} GiB: refused")
                file.write(part)
        file.flush()

    try:
        with explained(without_secrets(url)):
            again(attempt)
    except UserError as error:
        raise UserError(without_secrets(str(error))) from None
