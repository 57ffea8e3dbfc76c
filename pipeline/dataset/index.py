"""Make a dataset of existing WebDataset tars: read their headers, write indexes and a manifest. The tars do not change.

First all tars are scanned (see `pipeline.dataset.webdataset`), and their rows are kept in temporary files on the local
disk. Only if no tar is damaged, or damaged samples may be skipped, are the indexes written, and the manifest last. So a
scan that fails changes nothing. What labels mean is decided from all of them, see `pipeline.dataset.labels`.
"""

import functools
import hashlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.fields import Fields, kept_array, parse_fields
from pipeline.dataset.labels import LabelCollector, LabelEncoder
from pipeline.dataset.manifest import (
    BUILDING,
    INDEX_SCHEMA,
    MANIFEST,
    NO_LABEL,
    SHARDS_SCHEMA,
    Manifest,
    content_digest,
    index_name,
    read_file,
    write_dataset,
)
from pipeline.dataset.scan_notes import ScanNotes
from pipeline.dataset.tar_sample import IMAGE_TYPES
from pipeline.dataset.webdataset import (
    NO_FIELDS,
    ScannedShard,
    ScanOptions,
    SkippedSamples,
    compressed_message,
    describe_sample,
    image_kinds,
    is_hidden,
    rows_schema,
    scan_shard,
)
from pipeline.errors import UserError
from pipeline.parallel import map_ahead
from pipeline.storage.parquet import parse_parquet, to_parquet
from pipeline.storage.store import TEMPORARY, Store, open_store
from pipeline.text import plural

THREADS = 16  # more than cores, because they mostly wait for small reads
COMPRESSED_NAME = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z|br)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


@dataclass
class IndexResult:
    """The manifest that was written, and counts over all tars."""

    manifest: Manifest
    skipped: SkippedSamples
    without_image: int  # samples without an image; they are not in the dataset
    without_label: int  # samples of the dataset without a label
    other_files: int  # files that belong to no sample, such as ._name
    notes: list[str]  # what users may not expect, one line each


def find_shards(store: Store, skip_damaged: bool = False) -> list[str]:
    """Return the names of all tars below the store's folder, sorted.

    UserError if there are none, or one is compressed and `skip_damaged` is false. Otherwise a compressed one is in the result,
    for `scan_shard` to list.
    """
    names = store.names()
    if not names and not store.exists(""):
        raise UserError(f"{store.url}: no such folder")
    compressed = [name for name in names if COMPRESSED_NAME.search(name) and not is_hidden(name)]
    for name in compressed:
        SkippedSamples(skip_damaged).add(compressed_message(store, name), "Decompress it")
    tars = sorted([n for n in names if n.lower().endswith(".tar") and not is_hidden(n)] + compressed)
    if not tars:
        raise UserError(f"{store.url} has no .tar files")
    return tars


def index_shards(
    store: Store,
    names: list[str],
    to: Store,
    *,
    checksums: bool = False,
    bits: int | None = None,
    skip_damaged: bool = False,
    fields: Fields = NO_FIELDS,
    overwrite: bool = False,
    on_shard: Callable[[], None] = lambda: None,
) -> IndexResult:
    """Index the tars `names` of `store`, and write indexes, table of shards and manifest to `to`.

    Args:
        checksums: whether to read all bytes and store checksums, so that changed bytes are detected later. Otherwise
            only headers are read.
        bits: significant bits of 16-bit images. None: what their files say, or what the values of some of them use.
        skip_damaged: whether to skip damaged samples. Otherwise the first one is a UserError.
        fields: which files and fields become the image, the label and further columns.
        overwrite: whether to replace a dataset in `to`.
        on_shard: called after each tar is read.
    """
    _check_destination(store, to, overwrite)
    skipped = SkippedSamples(skip_damaged)
    options = ScanOptions(checksums, skip_damaged, fields)
    collector, notes = LabelCollector(fields.kind), ScanNotes()
    scans: list[ScannedShard] = []
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        spool = RowSpool(open_store(folder), names, rows_schema(fields))
        for scan in map_ahead(lambda name: scan_shard(store, name, options), names, THREADS):
            rows = _without_known_keys(scan, spool)
            spool.add(rows)
            collector.add(rows["label"].to_pylist(), functools.partial(_place, scan.name, rows))
            skipped.merge(scan.skipped)
            notes.merge(scan.notes)
            scan.rows = None
            scans.append(scan)
            on_shard()
        if not spool.rows:
            raise UserError(no_images(store, len(names), fields, skipped))
        notes.check(store.url, fields)
        encoder, types = collector.encoder(), notes.types()
        if encoder.first_problem and not skip_damaged:
            skipped.add(encoder.first_problem)  # raises
        kinds = image_kinds(store, scans, bits)
        pixels = kinds.pixels(bits)

        if to.exists(MANIFEST):
            to.remove([MANIFEST])
        shards = []
        for shard in map_ahead(
            lambda n: _write_index(to, scans[n], spool.read(n), encoder, types), range(len(names)), THREADS
        ):
            skipped.merge(shard.skipped)
            if shard.row["samples"]:  # a tar without samples is not a shard
                shards.append(shard)
    manifest = write_dataset(
        to,
        pa.Table.from_pylist([shard.row for shard in shards], schema=SHARDS_SCHEMA),
        sum(shard.image_bytes for shard in shards),
        encoder.classes,
        {
            "indexed": store.url,
            "left_out": skipped.count,
            **built_fields(fields, types),
            **({"flags": True} if encoder.flags else {}),
        },
        checksums=checksums,
        shards_url=None if to.url == store.url else store.url,
        labels=encoder.kind,
        pixels=pixels,
    )
    return IndexResult(
        manifest,
        skipped,
        sum(scan.without_image for scan in scans),
        sum(shard.without_label for shard in shards),
        sum(scan.other_files for scan in scans),
        [*notes.lines(fields), *(note for note in (encoder.note, kinds.note(bits)) if note)],
    )


@dataclass
class _IndexedShard:
    """The index of one tar, after it was written."""

    row: dict[str, Any]  # of SHARDS_SCHEMA
    image_bytes: int
    without_label: int
    skipped: SkippedSamples  # samples whose labels contradict the others


def _write_index(
    to: Store, scan: ScannedShard, rows: pa.Table, encoder: LabelEncoder, types: dict[str, str]
) -> _IndexedShard:
    """Write the index of a tar, unless it has no samples.

    Args:
        rows: `rows_schema`.
        types: of the kept columns.
    """
    texts, skipped = rows["label"].to_pylist(), SkippedSamples(allowed=True)
    if encoder.first_problem:
        problems = {text: encoder.problem(text) for text in set(texts)}
        place = functools.partial(_place, scan.name, rows)
        for i, text in enumerate(texts):
            if problems[text]:
                skipped.add(f"{place(i)}: {problems[text]}")
        rows = rows.filter(pa.array([problems[text] is None for text in texts], pa.bool_()))
        texts = [text for text in texts if problems[text] is None]
    labels = encoder.encode(texts)
    index = index_table(rows, labels, types)
    if len(index):
        to.write(index_name(scan.name), to_parquet(index))
    row = {
        "name": scan.name,
        "samples": len(index),
        "bytes": scan.bytes,
        "sha256": scan.sha256,
        "content": content_digest(index),
    }
    missing = pc.equal(labels, NO_LABEL) if encoder.kind == "class" else pc.is_null(labels)
    return _IndexedShard(row, pc.sum(index["size"]).as_py() or 0, pc.sum(missing).as_py() or 0, skipped)


def index_table(rows: pa.Table, labels: pa.Array, types: dict[str, str]) -> pa.Table:
    """The index of a tar: INDEX_SCHEMA with these labels, then the kept columns.

    Args:
        rows: `rows_schema`.
        labels: `label_type` of their kind.
        types: of the kept columns, see `KEPT_TYPES`.
    """
    place = INDEX_SCHEMA.get_field_index("label")
    schema = INDEX_SCHEMA.set(place, pa.field("label", labels.type))
    index = rows.select(INDEX_SCHEMA.names).set_column(place, "label", labels).cast(schema)
    for name, kind in types.items():
        index = index.append_column(name, kept_array(rows[name].to_pylist(), kind))
    return index


def built_fields(fields: Fields, types: dict[str, str]) -> dict[str, Any]:
    """The fields that were chosen, for the manifest: `fields_of` reads them back."""
    built = {
        "image": fields.image,
        "label": fields.label,
        "label_kind": fields.kind,
        "keep_json": ",".join(fields.keep) or None,
        "kept_types": ",".join(types.values()) or None,
        "split_at": fields.split_at if fields.split_at != "first-dot" else None,
    }
    return {name: value for name, value in built.items() if value is not None}


def fields_of(built: dict[str, Any]) -> tuple[Fields, dict[str, str]]:
    """The fields that `built_fields` recorded, and the types of the kept columns."""
    fields = parse_fields(
        built.get("image"),
        built.get("label"),
        built.get("label_kind"),
        built.get("keep_json"),
        built.get("split_at", "first-dot"),
    )
    return fields, dict(zip(fields.columns, built.get("kept_types", "").split(","), strict=False))


def no_images(store: Store, tars: int, fields: Fields, skipped: SkippedSamples) -> str:
    """The error for tars without images."""
    if fields.image:
        why = f"no sample has a file .{fields.images[0]}, which --image names"
    else:
        why = f"the extension, after the first dot of the file name, must be {', '.join(IMAGE_TYPES)}"
    return f"{store.url}: no images in {plural(tars, 'tar')}: {why}{''.join(f'; {line}' for line in skipped.listed[:1])}"


def _place(shard: str, rows: pa.Table, i: int) -> str:
    """Name the sample of a row in a message."""
    return describe_sample(shard, rows["key"][i].as_py(), rows["offset"][i].as_py())


def _check_destination(store: Store, to: Store, overwrite: bool) -> None:
    """UserError if the dataset cannot be written to `to`. Checked first, because scanning may take hours."""
    for place in (store, to):
        if place.exists(BUILDING):
            raise UserError(
                f"{place.url} contains an unfinished build: run the build again to resume it, or remove {BUILDING}"
            )
    if to.exists(MANIFEST) and not overwrite:
        raise UserError(
            f"{to.url} already has a dataset: add --overwrite, or choose another destination with --to"
        )
    probe = f"{TEMPORARY}probe"
    try:
        to.write(probe, b"\n")
        to.remove([probe])
    except UserError as error:
        raise UserError(f"{error}. To write the indexes to another place, add --to") from error


def _without_known_keys(scan: ScannedShard, spool: "RowSpool") -> pa.Table:
    """The rows whose keys are not in earlier tars. The others are skipped."""
    keys = scan.rows["key"].to_pylist()
    earlier = spool.find_keys(keys)
    if not earlier:
        return scan.rows
    for i, key in enumerate(keys):
        if key in earlier:
            scan.skipped.add(
                f"{_place(scan.name, scan.rows, i)}: duplicate key, it is also at {earlier[key]}"
            )
    return scan.rows.filter(pa.array([key not in earlier for key in keys], pa.bool_()))


class RowSpool:
    """The rows of the tars read so far, in files on the local disk, and a way to find keys in them.

    The memory is 12 bytes per key: 64-bit hashes in sorted arrays. A match is looked up in the rows, so two keys with
    the same hash are not taken for duplicates.
    """

    def __init__(self, store: Store, names: list[str], schema: pa.Schema) -> None:
        self.store, self.names, self.schema = store, names, schema
        self.count = 0  # of tars
        self.rows = 0
        # Sorted arrays: hashes of keys, and the number of the tar of each.
        self.runs: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]] = []

    def add(self, rows: pa.Table) -> None:
        """Add the rows (`rows_schema`) of the next tar."""
        self.store.write(f"{self.count}.parquet", to_parquet(rows))
        self.rows += len(rows)
        hashes = _hashes(rows["key"].to_pylist())
        shards = np.full(len(hashes), self.count, np.int32)
        self.count += 1
        while self.runs and len(self.runs[-1][0]) <= 2 * len(hashes):  # merge, to keep few runs
            longer = self.runs.pop()
            hashes, shards = np.concatenate([longer[0], hashes]), np.concatenate([longer[1], shards])
        order = np.argsort(hashes)
        if len(order):
            self.runs.append((hashes[order], shards[order]))

    def read(self, number: int) -> pa.Table:
        """The rows (`rows_schema`) of a tar, counted from 0."""
        name = f"{number}.parquet"
        return parse_parquet(name, read_file(self.store, name), self.schema, self.schema.names)

    def find_keys(self, keys: list[str]) -> dict[str, str]:
        """Those of `keys` that were added before, each with its place: "byte 1024 of a.tar"."""
        hashes = _hashes(keys)
        candidates: set[int] = set()
        for run, shards in self.runs:
            at = np.searchsorted(run, hashes).clip(max=len(run) - 1)
            candidates.update(shards[at[run[at] == hashes]].tolist())
        wanted = set(keys) if candidates else set()
        found = {}
        for number in sorted(candidates):
            rows = self.read(number)
            for key, offset in zip(rows["key"].to_pylist(), rows["offset"].to_pylist(), strict=True):
                if key in wanted:
                    found[key] = f"byte {offset} of {self.names[number]}"
        return found


def _hashes(keys: list[str]) -> npt.NDArray[np.uint64]:
    """uint64[keys]."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)
