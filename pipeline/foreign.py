"""Make a dataset of tar shards made by others: their headers are read, and indexes written; no tar is touched.

Every shard is read first, and its rows are put aside on the local disk. Only when all are sound, or what is
damaged may be left out, are the indexes written, and the manifest last. So what stops half-way changes nothing.
What a shard may hold is said in pipeline.scan. Labels are numbers, and stay, or class names, and become the
numbers of their sorted list.
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

from pipeline.ahead import map_ahead
from pipeline.errors import UserError
from pipeline.manifest import (
    BUILDING,
    INDEX_SCHEMA,
    MANIFEST,
    NO_LABEL,
    SHARDS_SCHEMA,
    Manifest,
    content_digest,
    index_name,
    read_object,
    write_dataset,
)
from pipeline.parquet import parse_parquet, to_parquet
from pipeline.scan import (
    IMAGES,
    ROWS_SCHEMA,
    LeftOut,
    Scanned,
    compressed,
    describe,
    scan_shard,
)
from pipeline.storage import TEMPORARY, Store, open_store

MAX_CLASSES = 1_000_000  # a larger number is no class
THREADS = 16  # they wait for small reads most of the time
COMPRESSED_NAME = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z|br)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


@dataclass
class Indexed:
    """What was found in all shards."""

    manifest: Manifest
    left_out: LeftOut
    without_image: int  # samples; they are not in the index
    without_label: int  # samples of the index
    other_files: int  # such as ._name and names without an extension
    webp: int  # images


def find_shards(store: Store) -> list[str]:
    """The names of all tars below, sorted. UserError where there is none, or one is compressed."""
    names = store.names()
    if not names and not store.exists(""):
        raise UserError(f"{store.url}: no such folder")
    for name in names:
        if COMPRESSED_NAME.search(name):
            raise UserError(compressed(store, name))
    tars = [n for n in names if n.lower().endswith(".tar") and not n.rpartition("/")[2].startswith(".")]
    if not tars:
        raise UserError(f"{store.url} has no *.tar in it")
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
) -> Indexed:
    """Index the tars `names` of `store`, and write indexes, table of shards and manifest into `to`.

    Without `checksums` only headers are read, and flipped bytes of an image will not be noticed. The first
    damaged sample is a UserError, unless `skip_damaged`. `on_shard` is called after each shard is read.
    """
    _claim(store, to, overwrite)
    found = LeftOut(skip_damaged)
    labels = Labels()
    scans: list[Scanned] = []
    without_label = image_bytes = 0
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        aside = Aside(open_store(folder), names)
        for scan in map_ahead(lambda name: scan_shard(store, name, checksums, skip_damaged), names, THREADS):
            rows = _sift(scan, aside, labels)
            aside.add(rows)
            found.merge(scan.left_out)
            without_label += rows["label"].to_pylist().count("")
            image_bytes += sum(rows["size"].to_pylist())
            scan.rows = None
            scans.append(scan)
            on_shard()
        if not image_bytes:
            raise UserError(
                f"{store.url}: no image in {len(names)} tars: looked for .{', .'.join(IMAGES)} right after the "
                f"first dot of a file name{''.join(f'; {line}' for line in found.named[:1])}"
            )
        classes = labels.classes()

        def publish(number: int) -> dict[str, Any] | None:
            rows = aside.read(number)
            if not len(rows):
                return None  # a tar without samples is no shard
            coded = labels.code(rows["label"].to_pylist())
            index = rows.set_column(rows.column_names.index("label"), "label", coded)
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
        shards = [row for row in map_ahead(publish, range(len(names)), THREADS) if row]
    manifest = write_dataset(
        to,
        pa.Table.from_pylist(shards, schema=SHARDS_SCHEMA),
        image_bytes,
        classes,
        {"indexed": store.url, "left_out": found.count},
        checksums=checksums,
        shards_url=None if to.url == store.url else store.url,
    )
    return Indexed(
        manifest,
        found,
        sum(scan.without_image for scan in scans),
        without_label,
        sum(scan.other_files for scan in scans),
        sum(scan.webp for scan in scans),
    )


def _claim(store: Store, to: Store, overwrite: bool) -> None:
    """Find out now, not after hours of reading, what keeps the dataset from being written."""
    for place in (store, to):
        if place.exists(BUILDING):
            raise UserError(
                f"{place.url}: a build was begun there and not finished: run it again, or remove {BUILDING}"
            )
    if to.exists(MANIFEST) and not overwrite:
        raise UserError(f"{to.url} already has a dataset: add --overwrite, or choose another place with --to")
    probe = f"{TEMPORARY}probe"
    try:
        to.write(probe, b"\n")
        to.remove([probe])
    except (UserError, NotImplementedError) as error:
        why = error if isinstance(error, UserError) else f"{to.url} cannot be written"
        raise UserError(
            f"{why}. The indexes need not lie beside the tars: choose a place with --to"
        ) from error


def _sift(scan: Scanned, aside: "Aside", labels: "Labels") -> pa.Table:
    """The rows of a shard that go well with those of the shards before it."""
    earlier = aside.places(scan.rows["key"].to_pylist())
    keep = []
    for key, label, offset in zip(
        *(scan.rows[c].to_pylist() for c in ("key", "label", "offset")), strict=True
    ):
        problem = f"the key is there already, at {earlier[key]}" if key in earlier else labels.problem(label)
        if problem:
            scan.left_out.add(f"{describe(scan.name, key, offset)}: {problem}")
        keep.append(problem is None)
    return scan.rows.filter(pa.array(keep, pa.bool_()))


class Aside:
    """The rows of the shards read so far, on the local disk, and in which of them a key is.

    In memory it is 12 bytes a key: 64-bit hashes in sorted runs. What they say is looked up, so that two keys
    of one hash are no error.
    """

    def __init__(self, store: Store, names: list[str]) -> None:
        self.store, self.names = store, names
        self.count = 0
        self.runs: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]] = []  # hashes, shard of each

    def add(self, rows: pa.Table) -> None:
        """Put aside the rows (ROWS_SCHEMA) of the next shard."""
        self.store.write(f"{self.count}.parquet", to_parquet(rows))
        hashes = _hashes(rows["key"].to_pylist())
        shards = np.full(len(hashes), self.count, np.int32)
        self.count += 1
        while self.runs and len(self.runs[-1][0]) <= 2 * len(hashes):  # so there are few runs
            longer = self.runs.pop()
            hashes, shards = np.concatenate([longer[0], hashes]), np.concatenate([longer[1], shards])
        order = np.argsort(hashes)
        if len(order):
            self.runs.append((hashes[order], shards[order]))

    def read(self, number: int) -> pa.Table:
        name = f"{number}.parquet"
        return parse_parquet(name, read_object(self.store, name), ROWS_SCHEMA, ROWS_SCHEMA.names)

    def places(self, keys: list[str]) -> dict[str, str]:
        """Where those of `keys` lie that are there already: "byte 1024 of a.tar"."""
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
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


class Labels:
    """Whether labels are numbers or class names, which the first one decides, and which there are."""

    def __init__(self) -> None:
        self.numbers: bool | None = None
        self.highest = -1
        self.names: set[str] = set()

    def problem(self, label: str) -> str | None:
        """Take note of a label ("" for none). What is wrong with it, if anything is."""
        if not label:
            return None
        is_number = re.fullmatch(r"-?[0-9]+", label) is not None
        if self.numbers is None:
            self.numbers = is_number
        if is_number != self.numbers:
            kinds = ("a class name", "a number")
            return f"its label {label[:40]} is {kinds[is_number]}, the first one was {kinds[self.numbers]}"
        if is_number and not (len(label) < 10 and 0 <= int(label) < MAX_CLASSES):
            return f"its label {label[:40]} is no class: they go from 0 to {MAX_CLASSES - 1}"
        if is_number:
            self.highest = max(self.highest, int(label))
        else:
            self.names.add(label)
        return None

    def code(self, texts: list[str]) -> pa.Array:
        """The label of each: a number, or the place of its class; NO_LABEL for ""."""
        place = {name: i for i, name in enumerate(sorted(self.names))}
        return pa.array([(place[t] if self.names else int(t)) if t else NO_LABEL for t in texts], pa.int32())

    def classes(self) -> list[str]:
        """The name of each class; a number is its own name."""
        return sorted(self.names) if self.names else [str(i) for i in range(self.highest + 1)]
