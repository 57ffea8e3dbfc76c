"""Write one shard: what a task does."""

import hashlib
import itertools
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import webdataset
from crc32c import crc32c
from pydantic import BaseModel

from pipeline.errors import UserError
from pipeline.images import Changes, Checked, check_image
from pipeline.items import Item, Ranges, Scenes, map_items, rows_of
from pipeline.manifest import (
    BUILDING,
    BUILDING_FOLDER,
    INDEX_SCHEMA,
    NO_LABEL,
    content_digest,
    index_name,
    to_parquet,
)
from pipeline.storage import Store, open_shared


@dataclass(frozen=True)
class Options:
    """Of a build; all of them are in what it writes."""

    shard_bytes: int = 128 << 20  # of the source's images
    seed: int = 0  # of the shuffle
    check: Literal["decode", "header"] = "decode"  # what is looked at of each image
    changes: Changes = field(default_factory=Changes)
    strict: bool = False  # whether an image that cannot be read stops the build
    drop_duplicates: bool = False  # whether of images that are the same the first alone stays


@dataclass(frozen=True)
class Shard:
    """A shard to be written: all that a task is given."""

    name: str
    items: pa.Table  # ITEMS, in order
    reader: Ranges | Scenes
    store: str  # URL
    options: Options
    memory: int  # bytes of images that may be in memory at once
    plan: str  # digest
    build: str  # whose it is, see `build_digest`


class Receipt(BaseModel):
    """That a shard is done."""

    plan: str
    name: str
    images: int  # of the source, and their bytes
    source_bytes: int
    samples: int
    bytes: int  # of the tar
    image_bytes: int
    sha256: str  # of the tar
    index_sha256: str
    content: str
    left_out: list[str]  # "name: reason" of each bad image
    odd: dict[str, int]  # images that are no RGB or grey JPEG, by what they are
    changed: int  # images whose bytes are not the source's


def build_digest(store: Store) -> str:
    """Of the build that is under way. FileNotFoundError if there is none."""
    return hashlib.sha256(store.read(BUILDING)).hexdigest()


def _check_build(store: Store, shard: Shard) -> None:
    """UserError if it is another build's turn: this task's own was killed, and nobody has ended the task yet."""
    try:
        now = build_digest(store)
    except FileNotFoundError:
        now = "none"
    if now != shard.build:
        raise UserError(f"{store.url}: another build has begun there, so this one writes no more")


def write_shard(shard: Shard) -> tuple[Receipt, bool]:
    """Write one shard and its index, unless they are there. Returns its receipt, and whether they were."""
    store = open_shared(shard.store, BUILDING)
    if receipt := _still_there(store, shard):
        return receipt, True
    left_out: list[str] = []
    samples = _samples(shard, left_out)
    head = next(samples, None)
    written = _Written()
    index_sha256 = content = ""
    if head is not None:
        with store.staging(shard.name) as path:
            with path.open("wb", buffering=1 << 16) as file:  # which images of that size go past
                _write_tar(_Digesting(file, written), itertools.chain([head], samples), written)
            size = path.stat().st_size
            _check_build(store, shard)
        index = pa.table(written.columns, schema=INDEX_SCHEMA)
        data = to_parquet(index)
        _check_build(store, shard)
        store.write(index_name(shard.name), data)
        index_sha256, content = hashlib.sha256(data).hexdigest(), content_digest(index)
    receipt = Receipt(
        plan=shard.plan,
        name=shard.name,
        images=len(shard.items),
        source_bytes=int(shard.items["size"].to_numpy().sum()),
        samples=len(written.columns["key"]),
        bytes=size if head else 0,
        image_bytes=sum(written.columns["size"]),
        sha256=written.digest.hexdigest(),
        index_sha256=index_sha256,
        content=content,
        left_out=left_out,
        odd=written.odd,
        changed=written.changed,
    )
    _check_build(store, shard)
    store.write(receipt_name(shard.name), receipt.model_dump_json().encode())
    return receipt, False


@dataclass
class _Written:
    """What is in a tar."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in INDEX_SCHEMA.names})
    digest: Any = field(default_factory=hashlib.sha256)
    odd: dict[str, int] = field(default_factory=dict)
    changed: int = 0


def _samples(shard: Shard, left_out: list[str]) -> Iterator[tuple[Item, Checked]]:
    """The images that can be read, in order; a line for each other one goes into `left_out`."""
    read = shard.reader.open()
    decode, changes = shard.options.check == "decode", shard.options.changes

    def load(item: Item) -> Checked | str:
        try:
            return check_image(read(item), decode, changes)
        except ValueError as error:
            return str(error)

    items = rows_of(shard.items)
    checked = map_items(load, items, shard.reader, shard.memory)
    for item, image in zip(items, checked, strict=True):
        if isinstance(image, Checked):
            yield item, image
            continue
        if shard.options.strict:
            raise UserError(f"{item.describe()} cannot be read: {image}. Mend it, or build without --strict")
        left_out.append(f"{item.describe()}: {image}")


def _write_tar(file: "_Digesting", samples: Iterable[tuple[Item, Checked]], written: _Written) -> None:
    """Write samples, and note where their images lie."""
    # PAX is USTAR but for names too long for it. Fixed times and owners make the bytes repeatable.
    with webdataset.TarWriter(file, mtime=0, user="maestream", group="maestream", format="PAX_FORMAT") as tar:
        tar.tarstream.copybufsize = 1 << 20  # an image in one piece, not in pieces of 16 KiB
        for item, image in samples:
            label = {} if item.label == NO_LABEL else {"cls": str(item.label).encode()}
            tar.write({"__key__": item.key, image.extension: image.data, **label})
            # Files of a sample come in their extensions' order, so the image is the last, padded to whole blocks.
            offset = tar.tarstream.offset - -(-len(image.data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            row = (
                item.key,
                offset,
                len(image.data),
                item.label,
                image.width,
                image.height,
                crc32c(image.data),
            )
            for column, value in zip(written.columns.values(), row, strict=True):
                column.append(value)
            written.changed += image.changed
            if image.odd:
                written.odd[image.odd] = written.odd.get(image.odd, 0) + 1
            tar.tarstream.members.clear()  # it would keep them all


class _Digesting:
    """A file to write to, with the digest of what was written."""

    def __init__(self, file: BinaryIO, written: _Written) -> None:
        self.file, self.digest = file, written.digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _still_there(store: Store, shard: Shard) -> Receipt | None:
    """The receipt of a shard that is done, if what it tells of is there, to the last byte."""
    try:
        receipt = Receipt.model_validate_json(store.read(receipt_name(shard.name)))
        if receipt.plan != shard.plan or (shard.options.strict and receipt.left_out):
            return None
        if receipt.samples and (
            store.sha256(shard.name) != receipt.sha256
            or store.sha256(index_name(shard.name)) != receipt.index_sha256
        ):
            return None
    except (FileNotFoundError, ValueError):
        return None
    return receipt


def receipt_name(shard: str) -> str:
    return f"{BUILDING_FOLDER}/{shard.removesuffix('.tar')}.json"
