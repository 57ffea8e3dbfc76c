"""Tars as sources of images. They are never unpacked: their headers are read, and say where each image lies."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from pipeline import imagenet
from pipeline.ahead import Run, map_ahead
from pipeline.errors import UserError
from pipeline.foreign import THREADS, Labels
from pipeline.items import ITEMS, Ranges, Source, is_image, key_of, make_source
from pipeline.manifest import NO_LABEL, open_dataset
from pipeline.scan import printable, scan_shard
from pipeline.storage import Store, open_shared
from pipeline.tars import PASSED_WINDOW, WINDOW, RangedFile, TarDamageError, tar_members

Row = tuple[str, int, int]  # name, offset, size
Part = tuple[str, int, int]  # a tar in the tar: its name, offset, size


def tar_source(store: Store, name: str, devkit: str | None, run: Run) -> Source:
    """One tar: of class tars, of ImageNet's validation images, or of WebDataset samples."""
    try:
        first = next(_files(store, name), None)
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)}: no such file") from None
    if first is None:
        raise UserError(f"{store.describe(name)} has nothing in it")
    if first[0].endswith(".tar"):
        return _class_tars(store, name, run)
    if imagenet.VALIDATION_NAME.fullmatch(first[0]):
        return _validation_tar(store, name, devkit)
    return webdataset_source(store, [name])


@dataclass(frozen=True)
class _ClassTar:
    """What a task is given."""

    url: str
    name: str  # of the tar it lies in
    part: Part
    label: int

    @property
    def wnid(self) -> str:
        return PurePosixPath(self.part[0]).stem


def _class_tars(store: Store, name: str, run: Run) -> Source:
    where = store.describe(name)
    parts: list[Part] = []
    for inner, offset, size in _files(store, name):
        if not inner.endswith(".tar"):
            raise UserError(
                f"{where} has {printable(inner)} in it beside the tars of its classes: take it out"
            )
        parts.append((inner, offset, size))
    parts.sort(key=lambda part: PurePosixPath(part[0]).stem)
    jobs = [_ClassTar(store.url, name, part, label) for label, part in enumerate(parts)]
    classes = [job.wnid for job in jobs]
    if twice := [c for c, n in Counter(classes).items() if n > 1]:
        raise UserError(f"{where} has two tars of the class {twice[0]}")
    # In tasks: they are a million headers, and of a bucket all of it is read.
    tables = dict(run(scan_class_tar, jobs))
    items = pa.concat_tables(tables[label] for label in range(len(classes)))
    return make_source(where, classes, Ranges(store.url), items)


def scan_class_tar(job: _ClassTar) -> tuple[int, pa.Table]:
    """The label of a class, and its images (ITEMS)."""
    store = open_shared(job.url, job.name)
    rows = [row for row in _files(store, job.name, job.part, _window(store)) if is_image(row[0])]
    if not rows:
        raise UserError(
            f"{store.describe(job.name)}: the class tar {printable(job.part[0])} has no images in it: download the archive "
            "again, or take the class tar out"
        )
    keys = [key_of(f"{job.wnid}/{row[0]}") for row in rows]
    return job.label, _items(rows, keys, [job.label] * len(rows), job.name)


def _window(store: Store) -> int:
    """Of a tar of images: here they are passed over, from a bucket they come sooner than another answer."""
    return WINDOW if store.is_local else PASSED_WINDOW


def _validation_tar(store: Store, name: str, devkit: str | None) -> Source:
    where = store.describe(name)
    if devkit is None:
        raise UserError(f"{where}: which class its images are of is in {imagenet.DEVKIT}: add --devkit FILE")
    truth = imagenet.read_devkit(devkit)
    classes = sorted(set(truth))
    code = {wnid: label for label, wnid in enumerate(classes)}
    rows, keys, labels = [], [], []
    for row in _files(store, name, window=_window(store)):
        number = imagenet.VALIDATION_NAME.fullmatch(row[0])
        if number is None:
            raise UserError(
                f"{where} has {printable(row[0])} in it, which is no validation image: take it out"
            )
        if not 1 <= int(number[1]) <= len(truth):
            raise UserError(f"{where}: {row[0]} is not among the {len(truth):,} images of {devkit}")
        wnid = truth[int(number[1]) - 1]
        rows.append(row)
        keys.append(key_of(f"{wnid}/{row[0]}"))
        labels.append(code[wnid])
    items = _items(rows, keys, labels, name)
    return make_source(where, classes, Ranges(store.url), items)


def webdataset_source(store: Store, names: list[str]) -> Source:
    """Samples of WebDataset tars, by its rules (see pipeline.scan)."""
    labels = Labels()
    tables, texts = [], []
    for scan in map_ahead(lambda name: scan_shard(store, name, False, False), names, THREADS):
        rows = scan.rows
        for key, label in zip(rows["key"].to_pylist(), rows["label"].to_pylist(), strict=True):
            if problem := labels.problem(label):
                raise UserError(f"{store.describe(scan.name)}: {printable(key)}: {problem}")
            texts.append(label)
        tables.append(
            pa.table(
                {
                    "key": rows["key"],
                    "label": np.full(len(rows), NO_LABEL, np.int32),
                    "file": [scan.name] * len(rows),
                    "offset": rows["offset"],
                    "size": rows["size"].cast(pa.int64()),
                },
                schema=ITEMS,
            )
        )
    items = pa.concat_tables(tables).set_column(1, ITEMS.field("label"), labels.code(texts))
    if not len(items):
        raise UserError(f"{store.url}: no image in {len(names)} tars")
    where = store.url if len(names) > 1 else store.describe(names[0])
    return make_source(where, labels.classes(), Ranges(store.url), items)


def dataset_source(store: Store) -> Source:
    """A dataset of ours: its indexes say all."""
    dataset = open_dataset(store.url)
    tables = []
    for shard, index in enumerate(
        map_ahead(dataset.read_index_table, range(dataset.manifest.shards), THREADS)
    ):
        tables.append(
            pa.table(
                {
                    "key": index["key"],
                    "label": index["label"],
                    "file": [dataset.shard_name(shard)] * len(index),
                    "offset": index["offset"],
                    "size": index["size"].cast(pa.int64()),
                },
                schema=ITEMS,
            )
        )
    items = pa.concat_tables(tables)
    return make_source(store.url, dataset.manifest.classes, Ranges(dataset.shard_store.url), items)


def _files(store: Store, name: str, part: Part | None = None, window: int = WINDOW) -> Iterator[Row]:
    """The files of a tar, or of a tar in it: where each lies in the outer one. UserError where it is damaged."""
    where = store.describe(name) + (f": the class tar {printable(part[0])}" if part else "")
    file = RangedFile(store, name, part=part[1:] if part else None, window=window)
    try:
        for member in tar_members(file):
            if member.isdir():
                continue
            inner = member.name.removeprefix("./")
            if not inner.isprintable():
                raise UserError(f"{where}: the file name {inner!a} is not printable UTF-8")
            if not member.isreg():
                raise UserError(f"{where}: {inner} is a link, or no file")
            if member.offset_data + member.size > file.size:
                raise TarDamageError(f"it ends too early, at byte {file.size}, in the middle of {inner}")
            yield inner, file.base + member.offset_data, member.size
    except TarDamageError as damage:
        raise UserError(f"{where}: {damage}. Download or copy it again") from None


def _items(rows: list[Row], keys: list[str], labels: list[int], file: str) -> pa.Table:
    return pa.table(
        {
            "key": keys,
            "label": labels,
            "file": [file] * len(rows),
            "offset": [row[1] for row in rows],
            "size": [row[2] for row in rows],
        },
        schema=ITEMS,
    )
