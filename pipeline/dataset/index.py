"""Make a dataset of existing WebDataset tars: read their headers, write indexes and a manifest. The tars do not change.

First all tars are scanned (see `pipeline.dataset.webdataset`), and their rows are kept in temporary files on the local
disk. Only if no tar is damaged, or damaged samples may be skipped, are the indexes written, and the manifest last. So a
scan that fails changes nothing. Numeric labels are kept; class names are sorted and numbered.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.dataset.labels import LabelEncoder
from pipeline.dataset.manifest import (
    BUILDING,
    INDEX_SCHEMA,
    MANIFEST,
    SHARDS_SCHEMA,
    Manifest,
    content_digest,
    index_name,
    read_file,
    write_dataset,
)
from pipeline.dataset.webdataset import (
    IMAGE_TYPES,
    ROWS_SCHEMA,
    ScannedShard,
    SkippedSamples,
    compressed_message,
    describe_sample,
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
    webp: int  # WebP images


def find_shards(store: Store) -> list[str]:
    """Return the names of all tars below the store's folder, sorted. UserError if there are none, or one is compressed."""
    names = store.names()
    if not names and not store.exists(""):
        raise UserError(f"{store.url}: no such folder")
    for name in names:
        if COMPRESSED_NAME.search(name):
            raise UserError(compressed_message(store, name))
    tars = [n for n in names if n.lower().endswith(".tar") and not n.rpartition("/")[2].startswith(".")]
    if not tars:
        raise UserError(f"{store.url} has no .tar files")
    return tars


def index_shards(
    store: Store,
    names: list[str],
    to: Store,
    *,
    checksums: bool = False,
    skip_damaged: bool = False,
    overwrite: bool = False,
    on_shard: Callable[[], None] = lambda: None,
) -> IndexResult:
    """Index the tars `names` of `store`, and write indexes, table of shards and manifest to `to`.

    Args:
        checksums: whether to read all bytes and store checksums, so that changed bytes are detected later. Otherwise
            only headers are read.
        skip_damaged: whether to skip damaged samples. Otherwise the first one is a UserError.
        overwrite: whether to replace a dataset in `to`.
        on_shard: called after each tar is read.
    """
    _check_destination(store, to, overwrite)
    skipped = SkippedSamples(skip_damaged)
    labels = LabelEncoder()
    scans: list[ScannedShard] = []
    without_label = image_bytes = 0
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        spool = RowSpool(open_store(folder), names)
        for scan in map_ahead(lambda name: scan_shard(store, name, checksums, skip_damaged), names, THREADS):
            rows = _valid_rows(scan, spool, labels)
            spool.add(rows)
            skipped.merge(scan.skipped)
            without_label += rows["label"].to_pylist().count("")
            image_bytes += sum(rows["size"].to_pylist())
            scan.rows = None
            scans.append(scan)
            on_shard()
        if not image_bytes:
            raise UserError(
                f"{store.url}: no images in {plural(len(names), 'tar')}: the extension, after the first dot of the file name, "
                f"must be {', '.join(IMAGE_TYPES)}{''.join(f'; {line}' for line in skipped.listed[:1])}"
            )
        classes = labels.classes()

        def write_index(number: int) -> dict[str, Any] | None:
            rows = spool.read(number)
            if not len(rows):
                return None  # a tar without samples is not a shard
            encoded = labels.encode(rows["label"].to_pylist())
            index = rows.set_column(rows.column_names.index("label"), "label", encoded)
            to.write(index_name(names[number]), to_parquet(index.cast(INDEX_SCHEMA)))
            return {
                "name": names[number],
                "samples": len(index),
                "bytes": scans[number].bytes,
                "sha256": scans[number].sha256,
                "content": content_digest(index),
            }

        if to.exists(MANIFEST):
            to.remove([MANIFEST])
        shards = [row for row in map_ahead(write_index, range(len(names)), THREADS) if row]
    manifest = write_dataset(
        to,
        pa.Table.from_pylist(shards, schema=SHARDS_SCHEMA),
        image_bytes,
        classes,
        {"indexed": store.url, "left_out": skipped.count},
        checksums=checksums,
        shards_url=None if to.url == store.url else store.url,
    )
    return IndexResult(
        manifest,
        skipped,
        sum(scan.without_image for scan in scans),
        without_label,
        sum(scan.other_files for scan in scans),
        sum(scan.webp for scan in scans),
    )


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
    except (UserError, NotImplementedError) as error:
        why = error if isinstance(error, UserError) else f"{to.url} cannot be written"
        raise UserError(f"{why}. To write the indexes to another place, add --to") from error


def _valid_rows(scan: ScannedShard, spool: "RowSpool", labels: LabelEncoder) -> pa.Table:
    """The rows whose keys are not in earlier tars, and whose labels are valid. The others are skipped."""
    earlier = spool.find_keys(scan.rows["key"].to_pylist())
    keep = []
    for key, label, offset in zip(
        *(scan.rows[c].to_pylist() for c in ("key", "label", "offset")), strict=True
    ):
        problem = f"duplicate key, it is also at {earlier[key]}" if key in earlier else labels.add(label)
        if problem:
            scan.skipped.add(f"{describe_sample(scan.name, key, offset)}: {problem}")
        keep.append(problem is None)
    return scan.rows.filter(pa.array(keep, pa.bool_()))


class RowSpool:
    """The rows of the tars read so far, in files on the local disk, and a way to find keys in them.

    The memory is 12 bytes per key: 64-bit hashes in sorted arrays. A match is looked up in the rows, so two keys with
    the same hash are not taken for duplicates.
    """

    def __init__(self, store: Store, names: list[str]) -> None:
        self.store, self.names = store, names
        self.count = 0
        # Sorted arrays: hashes of keys, and the number of the tar of each.
        self.runs: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]] = []

    def add(self, rows: pa.Table) -> None:
        """Add the rows (ROWS_SCHEMA) of the next tar."""
        self.store.write(f"{self.count}.parquet", to_parquet(rows))
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
        """The rows (ROWS_SCHEMA) of a tar, counted from 0."""
        name = f"{number}.parquet"
        return parse_parquet(name, read_file(self.store, name), ROWS_SCHEMA, ROWS_SCHEMA.names)

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
