"""Build and verify sharded datasets: plain WebDataset tars, each with an index beside it."""

import hashlib
import io
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import webdataset
from crc32c import crc32c
from PIL import Image

from pipeline.errors import UserError, why_undecodable
from pipeline.hashing import hash64
from pipeline.manifest import (
    BUILDING,
    INDEX_SCHEMA,
    MANIFEST,
    NO_LABEL,
    SHARDS,
    SHARDS_SCHEMA,
    Dataset,
    Manifest,
    content_digest,
    index_name,
    to_parquet,
    write_dataset,
)
from pipeline.sources import Item, Source
from pipeline.storage import TEMPORARY, Store

MEMBER_EXTENSION = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # of PIL's name of the format
THREADS = 8  # decoding releases the GIL, and reads wait
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Checked:
    """An image that decodes to its last row."""

    data: bytes
    extension: str
    width: int
    height: int


@dataclass
class Built:
    """What a build did."""

    manifest: Manifest
    left_out: list[str] = field(default_factory=list)  # "name: reason" of each bad image


def check_image(data: bytes) -> Checked:
    """Decode an image to its last row. ValueError, with the reason, where that fails."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in MEMBER_EXTENSION:
                raise ValueError(f"{image.format} is not supported")
            image.load()
            return Checked(data, MEMBER_EXTENSION[image.format], image.width, image.height)
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        raise ValueError(why_undecodable(error)) from error


def build(
    source: Source,
    store: Store,
    *,
    shard_bytes: int,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
    on_image: Callable[[], None] = lambda: None,
) -> Built:
    """Write `source` as a dataset into `store`, shuffled by `seed`; the images' bytes are not touched.

    Images that do not decode are left out and named, or stop the build if `strict`. The same source and
    seed give the same bytes. A build that is killed leaves no manifest; the next one starts clean.
    `on_image` is called after each image.
    """
    _claim(source, store, overwrite)
    items = source.items
    order = np.argsort(hash64(seed, np.arange(len(items))), kind="stable")
    left_out: list[str] = []
    shards: list[dict[str, Any]] = []
    image_bytes = 0

    def load(i: int) -> tuple[Item, Checked | str]:
        try:
            return items[i], check_image(items[i].load())
        except FileNotFoundError:
            return items[i], "it is gone since the folder was listed"
        except ValueError as error:
            return items[i], str(error)

    def good() -> Iterator[tuple[Item, Checked]]:
        for item, result in map_ahead(load, order.tolist()):
            on_image()
            if isinstance(result, Checked):
                yield item, result
            elif strict:
                raise UserError(f"{item.name} does not decode: {result}. Mend it, or build without --strict")
            else:
                left_out.append(f"{item.name}: {result}")

    samples = good()
    head = next(samples, None)
    while head is not None:
        shard, size, head = _write_shard(store, f"shard-{len(shards):06d}.tar", head, samples, shard_bytes)
        shards.append(shard)
        image_bytes += size
    if not shards:
        raise UserError(f"{source.description}: none of its {len(items)} images decodes, {left_out[0]}")
    table = pa.Table.from_pylist(shards, schema=SHARDS_SCHEMA)
    built = {"source": source.description, "seed": seed, "bytes": "untouched", "left_out": len(left_out)}
    manifest = write_dataset(store, table, image_bytes, source.classes, built)
    store.remove([BUILDING])
    return Built(manifest, left_out)


def _claim(source: Source, store: Store, overwrite: bool) -> None:
    """Make sure that `store` may be written, and that no reader takes it for a dataset meanwhile."""
    if source.store is not None and f"{store.url}/".startswith(f"{source.store.url}/"):
        raise UserError(f"{store.url} lies in the source itself: choose another destination")
    names = [name for name in store.names() if not PurePosixPath(name).name.startswith(TEMPORARY)]
    if MANIFEST in names and not overwrite:
        raise UserError(f"{store.url} already has a dataset: choose another destination, or add --overwrite")
    if MANIFEST in names and b'"indexed":' in store.read(MANIFEST):  # in damaged ones too
        raise UserError(
            f"{store.url} was made by `maestream shards index`, and its tars may be the only ones: choose another "
            "destination"
        )
    if names and MANIFEST not in names and BUILDING not in names:
        raise UserError(
            f"{store.url} is not empty and not a dataset ({names[0]}, …): choose another destination"
        )
    ours = [name for name in store.names() if _is_ours(name)]
    # The manifest goes first and BUILDING comes before all else, so that a kill here is recognised too.
    store.write(BUILDING, b"{}\n")
    store.remove(sorted(ours, key=lambda name: name != MANIFEST))


def _is_ours(name: str) -> bool:
    """Whether a build may remove it: nothing of other datasets that lie further down."""
    folder, _, base = name.rpartition("/")
    if folder == "":
        return name in (MANIFEST, SHARDS) or fnmatch(base, "shard-*.tar") or base.startswith(TEMPORARY)
    return folder == "index" and (fnmatch(base, "shard-*.parquet") or base.startswith(TEMPORARY))


def map_ahead(function: Callable[[T], R], inputs: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """`map` in threads, in order, with a bounded number of results waiting."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for value in inputs:
                waiting.append(pool.submit(function, value))
                if len(waiting) > 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_shard(
    store: Store,
    name: str,
    head: tuple[Item, Checked],
    samples: Iterator[tuple[Item, Checked]],
    shard_bytes: int,
) -> tuple[dict[str, Any], int, tuple[Item, Checked] | None]:
    """Write one shard and its index, from `head` on until the next image would pass `shard_bytes`.

    Returns its row of the shard table, the bytes of its images, and the head of the next shard.
    """
    checked: dict[str, Checked] = {}
    used = 0
    following: tuple[Item, Checked] | None = head
    with store.staging(name) as path:
        # PAX is USTAR but for names too long for it. Fixed times and owners make the bytes repeatable.
        with (
            path.open("wb") as file,
            webdataset.TarWriter(
                file, mtime=0, user="maestream", group="maestream", format="PAX_FORMAT"
            ) as tar,
        ):
            while following is not None and (not checked or used + len(following[1].data) <= shard_bytes):
                item, image = following
                label = {} if item.label == NO_LABEL else {"cls": str(item.label).encode()}
                tar.write({"__key__": item.key, image.extension: image.data, **label})
                checked[item.key] = Checked(b"", image.extension, image.width, image.height)
                used += len(image.data)
                following = next(samples, None)
        with path.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
            written.seek(0)
            rows = [
                {**row, "width": checked[row["key"]].width, "height": checked[row["key"]].height}
                for row in read_tar(written)
            ]
        index = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
        size = path.stat().st_size
    store.write(index_name(name), to_parquet(index))
    shard = {
        "name": name,
        "samples": len(index),
        "bytes": size,
        "sha256": sha256,
        "content": content_digest(index),
    }
    return shard, used, following


def read_tar(file: BinaryIO) -> list[dict[str, Any]]:
    """A row an image, in the tar's order: key, offset, size, label and crc32c.

    tarfile.ReadError where the tar is damaged.
    """
    labels: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            content = tar.extractfile(member)
            data = content.read() if content else b""
            if extension == "cls":
                labels[key] = int(data)
            elif extension in MEMBER_EXTENSION.values():
                row = {"key": key, "offset": member.offset_data, "size": member.size, "crc32c": crc32c(data)}
                rows.append(row)
    return [{**row, "label": labels.get(row["key"], NO_LABEL)} for row in rows]


def verify(dataset: Dataset, on_shard: Callable[[], None] = lambda: None) -> list[str]:
    """Read every byte and decode every image. Returns what is wrong, a line each; empty for a sound dataset.

    Without checksums in the manifest only what no longer decodes is found.
    """
    problems: list[str] = []
    for found in map_ahead(lambda shard: _verify_shard(dataset, shard), range(dataset.manifest.shards)):
        problems += found
        on_shard()
    return problems


def _verify_shard(dataset: Dataset, shard: int) -> list[str]:
    name = dataset.shard_name(shard)
    try:
        data = dataset.shard_store.read(name)
    except FileNotFoundError:
        return [f"{name}: missing"]
    problems = []
    if len(data) != dataset.shard_bytes[shard]:
        problems.append(f"{name}: {len(data)} bytes, the manifest says {dataset.shard_bytes[shard]}")
    elif dataset.shard_sha256[shard].as_py() not in ("", hashlib.sha256(data).hexdigest()):
        problems.append(f"{name}: its bytes are not those that were written (sha256 differs)")
    try:
        index = dataset.read_index_table(shard)
    except UserError as error:
        return [*problems, str(error)]
    if content_digest(index) != dataset.shard_content[shard].as_py():
        problems.append(f"{index_name(name)}: it is not the index that was written (digest differs)")
    for row in index.to_pylist():
        image = data[row["offset"] : row["offset"] + row["size"]]
        where = f"{name}: {row['key']} at byte {row['offset']}"
        if len(image) != row["size"]:
            problems.append(f"{where}: cut off")
        elif dataset.manifest.checksums and crc32c(image) != row["crc32c"]:
            problems.append(f"{where}: its bytes changed (crc32c differs)")
        else:
            try:
                checked = check_image(image)
            except ValueError as error:
                problems.append(f"{where}: does not decode ({error})")
            else:
                if (checked.width, checked.height) != (row["width"], row["height"]):
                    problems.append(f"{where}: {checked.width} × {checked.height}, the index says otherwise")
    return problems
