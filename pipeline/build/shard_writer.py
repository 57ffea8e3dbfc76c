"""Write one shard with its index and receipt. This runs in a task, independently of other shards."""

import hashlib
import itertools
import json
import math
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import webdataset
from crc32c import crc32c
from pydantic import BaseModel

from pipeline.build.image_table import ImageReader, Item, Label, SourceOptions, kept_names, map_items, rows_of
from pipeline.dataset.image_check import CheckedImage, Conversion, check_image
from pipeline.dataset.manifest import (
    BUILDING,
    BUILDING_FOLDER,
    INDEX_SCHEMA,
    NO_LABEL,
    content_digest,
    index_name,
)
from pipeline.errors import UserError
from pipeline.images.kinds import ImageKinds
from pipeline.storage.parquet import to_parquet
from pipeline.storage.store import Store, open_shared


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build. All but `strict` determine the bytes that it writes."""

    shard_bytes: int = 128 << 20  # approximate size of a shard, in bytes of the source's images
    seed: int = 0  # of the shuffle
    check: Literal["decode", "header"] = "decode"  # whether to decode each image or to read only its header
    conversion: Conversion = field(default_factory=Conversion)
    strict: bool = False  # whether an unreadable image is an error; otherwise it is skipped
    drop_duplicates: bool = False  # whether to keep only the first of identical images
    source: SourceOptions = field(default_factory=SourceOptions)


@dataclass(frozen=True)
class ShardJob:
    """A shard to write. The input of one task."""

    name: str
    items: pa.Table  # ITEMS, in the order of the shard
    reader: ImageReader
    store: str  # URL of the destination
    options: BuildOptions
    memory: int  # bytes of images that may be in memory at once
    plan: str  # digest of images and options
    build: str  # the build it belongs to, see `build_digest`


class Receipt(BaseModel):
    """Record of a finished shard: a resumed build keeps the shard if the digests still match."""

    plan: str  # see `ShardJob`
    name: str
    images: int  # in the source
    source_bytes: int  # size of these images
    samples: int  # in the shard
    bytes: int  # of the tar
    image_bytes: int  # size of the images in the shard
    sha256: str  # of the tar
    index_sha256: str
    content: str  # see `pipeline.dataset.manifest.content_digest`
    left_out: list[str]  # "name: reason" of each image that was skipped
    odd: dict[str, int]  # number of images that are not RGB or greyscale JPEGs, by kind, such as "PNG"
    changed: int  # number of images that were converted
    kinds: ImageKinds  # types of the images in the shard
    bits_lost: int  # the largest `CheckedImage.bits_lost`


def build_digest(store: Store) -> str:
    """Identifies the build in progress: the digest of building.json. FileNotFoundError if there is none."""
    return hashlib.sha256(store.read(BUILDING)).hexdigest()


def _check_build(store: Store, job: ShardJob) -> None:
    """UserError if another build has started in the destination: then this task is a leftover of a killed build."""
    try:
        current = build_digest(store)
    except FileNotFoundError:
        current = "none"
    if current != job.build:
        raise UserError(f"{store.url}: another build has started there, so this one stops writing")


def write_shard(job: ShardJob) -> tuple[Receipt, bool]:
    """Write a shard, its index and its receipt, unless it is finished. Returns the receipt, and whether it was finished.

    UserError if another build has started in the destination, or, with `strict`, if an image cannot be read.
    """
    store = open_shared(job.store, BUILDING)
    if receipt := _finished_receipt(store, job):
        return receipt, True
    skipped: list[str] = []
    samples = _samples(job, skipped)
    first = next(samples, None)
    contents = _TarContents()
    index_sha256 = content = ""
    if first is not None:
        with store.staging(job.name) as path:
            with path.open("wb", buffering=1 << 16) as file:  # larger images bypass the buffer
                _write_tar(_DigestingFile(file, contents), job, itertools.chain([first], samples), contents)
            size = path.stat().st_size
            _check_build(store, job)
        index = _index_table(job.items, contents)
        data = to_parquet(index)
        _check_build(store, job)
        store.write(index_name(job.name), data)
        index_sha256, content = hashlib.sha256(data).hexdigest(), content_digest(index)
    receipt = Receipt(
        plan=job.plan,
        name=job.name,
        images=len(job.items),
        source_bytes=int(job.items["size"].to_numpy().sum()),
        samples=len(contents.columns["key"]),
        bytes=size if first else 0,
        image_bytes=sum(contents.columns["size"]),
        sha256=contents.digest.hexdigest(),
        index_sha256=index_sha256,
        content=content,
        left_out=skipped,
        odd=contents.odd,
        changed=contents.changed,
        kinds=contents.kinds,
        bits_lost=contents.bits_lost,
    )
    _check_build(store, job)
    store.write(receipt_name(job.name), receipt.model_dump_json().encode())
    return receipt, False


@dataclass
class _TarContents:
    """What was written to a tar."""

    # The index's columns.
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in INDEX_SCHEMA.names})
    places: list[int] = field(default_factory=list)  # of the images in the job's table
    digest: Any = field(default_factory=hashlib.sha256)
    odd: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    kinds: ImageKinds = field(default_factory=ImageKinds)
    bits_lost: int = 0


def _index_table(items: pa.Table, contents: _TarContents) -> pa.Table:
    """The index of the tar, with the label's type and the kept values of its images."""
    kind = items.schema.field("label")
    schema = INDEX_SCHEMA.set(INDEX_SCHEMA.get_field_index("label"), kind)
    index = pa.table(contents.columns, schema=schema)
    kept = items.select(kept_names(items)).take(pa.array(contents.places, pa.int64()))
    for name in kept.column_names:
        index = index.append_column(name, kept[name])
    return index


def _samples(job: ShardJob, skipped: list[str]) -> Iterator[tuple[int, Item, CheckedImage]]:
    """Yield the readable images and their places in `job.items`, in order. Appends a line to `skipped` for each other one."""
    read = job.reader.open()
    decode, conversion = job.options.check == "decode", job.options.conversion

    def load(item: Item) -> CheckedImage | str:
        try:
            return check_image(read(item), decode, conversion)
        except ValueError as error:
            return str(error)

    items = rows_of(job.items)
    checked = map_items(load, items, job.reader, job.memory)
    for place, (item, image) in enumerate(zip(items, checked, strict=True)):
        if isinstance(image, CheckedImage):
            yield place, item, image
            continue
        if job.options.strict:
            raise UserError(
                f"{item.describe()} cannot be read: {image}. Repair the file, or build without --strict to skip it"
            )
        skipped.append(f"{item.describe()}: {image}")


def _write_tar(
    file: "_DigestingFile",
    job: ShardJob,
    samples: Iterable[tuple[int, Item, CheckedImage]],
    contents: _TarContents,
) -> None:
    """Write samples to a tar, and record their index rows in `contents`."""
    kept = job.items.select(kept_names(job.items)).to_pylist()
    # PAX equals USTAR except for long names. Fixed times and owners make the bytes reproducible.
    with webdataset.TarWriter(file, mtime=0, user="maestream", group="maestream", format="PAX_FORMAT") as tar:
        tar.tarstream.copybufsize = 1 << 20  # write an image at once, not in pieces of 16 KiB
        for place, item, image in samples:
            if fields := _field_files(item.label, kept[place] if kept else {}):
                tar.write({"__key__": item.key, **fields})
            tar.write({"__key__": item.key, image.extension: image.data})
            # The image is written last, padded to whole blocks.
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
            contents.places.append(place)
            for column, value in zip(contents.columns.values(), row, strict=True):
                column.append(value)
            contents.changed += image.changed
            name = item.describe()
            contents.kinds.add(name, image.channels, image.dtype, image.bits, image.bits_found)
            contents.bits_lost = max(contents.bits_lost, image.bits_lost)
            if image.odd:
                contents.odd[image.odd] = contents.odd.get(image.odd, 0) + 1
            tar.tarstream.members.clear()  # tarfile would keep every header in memory


def _field_files(label: Label, kept: dict[str, Any]) -> dict[str, bytes]:
    """The files of a sample besides its image, by extension: .cls with one class, .json with all else."""
    files = {} if isinstance(label, list) or label in (None, NO_LABEL) else {"cls": str(label).encode()}
    tree = {**({"label": label} if isinstance(label, list) else {}), **kept}
    # JSON has no infinite numbers.
    tree = {n: str(v) if v in (math.inf, -math.inf) else v for n, v in tree.items() if v is not None}
    return {**files, **({"json": json.dumps(tree, ensure_ascii=False).encode()} if tree else {})}


class _DigestingFile:
    """A file to write to that updates the digest of the tar."""

    def __init__(self, file: BinaryIO, contents: _TarContents) -> None:
        self.file, self.digest = file, contents.digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _finished_receipt(store: Store, job: ShardJob) -> Receipt | None:
    """The receipt of a finished shard, if tar and index still match its digests. Otherwise None."""
    try:
        receipt = Receipt.model_validate_json(store.read(receipt_name(job.name)))
        if receipt.plan != job.plan or (job.options.strict and receipt.left_out):
            return None
        if receipt.samples and (
            store.sha256(job.name) != receipt.sha256
            or store.sha256(index_name(job.name)) != receipt.index_sha256
        ):
            return None
    except (FileNotFoundError, ValueError):
        return None
    return receipt


def receipt_name(shard: str) -> str:
    """The receipt file of a shard: "building/shard-000000.json" for "shard-000000.tar"."""
    return f"{BUILDING_FOLDER}/{shard.removesuffix('.tar')}.json"
