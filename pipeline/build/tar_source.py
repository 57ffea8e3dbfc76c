"""Tars as a source. They are not unpacked: their headers tell where each image is."""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from pipeline.build import imagenet
from pipeline.build.file_names import is_image, key_of
from pipeline.build.image_table import ITEMS, RangeReader, Source, make_source, with_labels
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.fields import Fields, kept_array
from pipeline.dataset.index import THREADS, no_images
from pipeline.dataset.labels import LabelCollector
from pipeline.dataset.manifest import INDEX_SCHEMA, label_type
from pipeline.dataset.scan_notes import ScanNotes
from pipeline.dataset.webdataset import ScanOptions, SkippedSamples, printable, scan_shard
from pipeline.errors import UserError
from pipeline.parallel import ParallelMap, map_ahead
from pipeline.storage.ranged_file import WINDOW, RangedFile
from pipeline.storage.store import Store, open_shared
from pipeline.storage.tar_reader import BUCKET_WINDOW, TarDamageError, tar_members
from pipeline.text import plural

MAX_LEFT_OUT = 100_000  # damaged samples of a source that are listed
File = tuple[str, int, int]  # a file in a tar: name, offset, size
InnerTar = tuple[str, int, int]  # a tar in a tar: name, offset, size


def tar_source(store: Store, name: str, devkit: str | None, run: ParallelMap, fields: Fields) -> Source:
    """One tar with a tar per class, with ImageNet's validation images, or with WebDataset samples.

    `fields`: which files and fields of WebDataset samples are used.
    """
    try:
        first = next(_files(store, name), None)
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)}: no such file") from None
    if first is None:
        raise UserError(f"{store.describe(name)} has no files in it")
    is_class_tars = first[0].endswith(".tar")
    if is_class_tars or imagenet.VALIDATION_NAME.fullmatch(first[0]):
        if fields != Fields():
            raise UserError(
                f"{store.describe(name)} has ImageNet's layout, whose labels are known: leave out --image, --label, "
                "--label-kind, --keep-json and --split-at"
            )
        return _class_tars(store, name, run) if is_class_tars else _validation_tar(store, name, devkit)
    return webdataset_source(store, [name], fields)


@dataclass(frozen=True)
class _ClassTarJob:
    """The tar of one class, inside another tar. The input of one task."""

    url: str
    name: str  # of the outer tar
    inner: InnerTar
    label: int

    @property
    def wnid(self) -> str:
        return PurePosixPath(self.inner[0]).stem


def _class_tars(store: Store, name: str, run: ParallelMap) -> Source:
    where = store.describe(name)
    inner_tars: list[InnerTar] = []
    for inner, offset, size in _files(store, name):
        if not inner.endswith(".tar"):
            raise UserError(f"{where} has {printable(inner)} in it beside the class tars: remove it")
        inner_tars.append((inner, offset, size))
    inner_tars.sort(key=lambda inner: PurePosixPath(inner[0]).stem)
    jobs = [_ClassTarJob(store.url, name, inner, label) for label, inner in enumerate(inner_tars)]
    classes = [job.wnid for job in jobs]
    if repeated := [name for name, count in Counter(classes).items() if count > 1]:
        raise UserError(f"{where} has two tars of the class {repeated[0]}")
    # In parallel, because there are over a million headers, and from a bucket the whole tar is read.
    tables = dict(run(scan_class_tar, jobs))
    items = pa.concat_tables(tables[label] for label in range(len(classes)))
    return make_source(where, classes, RangeReader(store.url), items)


def scan_class_tar(job: _ClassTarJob) -> tuple[int, pa.Table]:
    """Return the label of a class and its images (ITEMS). UserError if the tar is damaged or has no images."""
    store = open_shared(job.url, job.name)
    files = [file for file in _files(store, job.name, job.inner, _window(store)) if is_image(file[0])]
    if not files:
        raise UserError(
            f"{store.describe(job.name)}: the class tar {printable(job.inner[0])} has no images in it: download the archive "
            "again, or remove the class tar"
        )
    keys = [key_of(f"{job.wnid}/{file[0]}") for file in files]
    return job.label, _items(files, keys, [job.label] * len(files), job.name)


def _window(store: Store) -> int:
    """Bytes per request for the headers of a tar of images, see BUCKET_WINDOW."""
    return WINDOW if store.is_local else BUCKET_WINDOW


def _validation_tar(store: Store, name: str, devkit: str | None) -> Source:
    where = store.describe(name)
    if devkit is None:
        raise UserError(f"{where}: the classes of its images are in {imagenet.DEVKIT}: add --devkit FILE")
    truth = imagenet.read_devkit(devkit)
    classes = sorted(set(truth))
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    files, keys, labels = [], [], []
    for file in _files(store, name, window=_window(store)):
        number = imagenet.VALIDATION_NAME.fullmatch(file[0])
        if number is None:
            raise UserError(
                f"{where} has {printable(file[0])} in it, which is not a validation image: remove it"
            )
        if not 1 <= int(number[1]) <= len(truth):
            raise UserError(f"{where}: {file[0]} is not among the {len(truth):,} images of {devkit}")
        wnid = truth[int(number[1]) - 1]
        files.append(file)
        keys.append(key_of(f"{wnid}/{file[0]}"))
        labels.append(label_of[wnid])
    items = _items(files, keys, labels, name)
    return make_source(where, classes, RangeReader(store.url), items)


def webdataset_source(store: Store, names: list[str], fields: Fields) -> Source:
    """The samples of WebDataset tars, see `pipeline.dataset.webdataset`. Damaged samples and tars are left out.

    `fields`: which files and fields are used.
    """
    options = ScanOptions(skip_damaged=True, fields=fields)
    collector, notes = LabelCollector(fields.kind), ScanNotes()
    skipped = SkippedSamples(allowed=True, limit=MAX_LEFT_OUT)
    tables: list[pa.Table] = []
    without_image = other_files = 0
    for scan in map_ahead(lambda name: scan_shard(store, name, options), names, THREADS):
        rows = scan.rows
        places = functools.partial(_place, store.describe(scan.name), rows)
        collector.add(rows["label"].to_pylist(), places)
        notes.merge(scan.notes)
        skipped.merge(scan.skipped)
        without_image += scan.without_image
        other_files += scan.other_files
        tables.append(rows.append_column("file", pa.array([scan.name] * len(rows), pa.string())))
    rows = pa.concat_tables(tables)
    where = store.url if len(names) > 1 else store.describe(names[0])
    if not len(rows):
        raise UserError(no_images(store, len(names), fields, skipped))
    notes.check(where, fields)
    encoder = collector.encoder()
    if encoder.first_problem:
        raise UserError(encoder.first_problem)
    items = rows.select(["key", "label", "file", "offset", "size"])
    items = items.set_column(0, "key", pa.array(map(_plain_key, rows["key"].to_pylist()), pa.string()))
    items = with_labels(items, encoder.encode(rows["label"].to_pylist()))
    items = items.cast(ITEMS.set(1, items.schema.field("label")))
    for name, kind in notes.types().items():
        items = items.append_column(name, kept_array(rows[name].to_pylist(), kind))
    lines = [*notes.lines(fields), *([encoder.note] if encoder.note else [])]
    if without_image or other_files:
        lines.append(
            f"ignored {plural(without_image, 'sample')} without an image, {plural(other_files, 'other file')}"
        )
    return make_source(where, encoder.classes, RangeReader(store.url), items, lines, skipped.listed)


def _plain_key(key: str) -> str:
    """The key without dots in its last part, where a WebDataset key ends."""
    folder, slash, base = key.rpartition("/")
    return folder + slash + base.replace(".", "_")


def _place(where: str, rows: pa.Table, i: int) -> str:
    return f"{where}: {printable(rows['key'][i].as_py())}"


def dataset_source(store: Store) -> Source:
    """The samples of a dataset with a manifest; its indexes tell where they are, and what else is known of them."""
    dataset = open_dataset(store.url)
    schema = ITEMS.set(ITEMS.get_field_index("label"), pa.field("label", label_type(dataset.manifest.labels)))
    tables = []
    read = functools.partial(dataset.read_index_table, kept=True)
    for shard, index in enumerate(map_ahead(read, range(dataset.manifest.shards), THREADS)):
        items = pa.table(
            {
                "key": index["key"],
                "label": index["label"],
                "file": [dataset.shard_name(shard)] * len(index),
                "offset": index["offset"],
                "size": index["size"].cast(pa.int64()),
            },
            schema=schema,
        )
        for name in index.column_names[len(INDEX_SCHEMA) :]:
            items = items.append_column(name, index[name])
        tables.append(items)
    items = pa.concat_tables(tables, promote_options="default")
    return make_source(store.url, dataset.manifest.classes, RangeReader(dataset.shard_store.url), items)


def _files(store: Store, name: str, inner: InnerTar | None = None, window: int = WINDOW) -> Iterator[File]:
    """Yield the files of a tar, or of a tar inside it. Offsets are in the outer tar. UserError if it is damaged.

    `window`: bytes per request, see `RangedFile`.
    """
    where = store.describe(name) + (f": the class tar {printable(inner[0])}" if inner else "")
    file = RangedFile(store, name, part=inner[1:] if inner else None, window=window)
    try:
        for member in tar_members(file):
            if member.isdir():
                continue
            path = member.name.removeprefix("./")
            if not path.isprintable():
                raise UserError(f"{where}: the file name {path!a} is not printable UTF-8")
            if not member.isreg():
                raise UserError(f"{where}: {path} is not a regular file")
            if member.offset_data + member.size > file.size:
                raise TarDamageError(f"the tar is cut off at byte {file.size}, inside {path}")
            yield path, file.base + member.offset_data, member.size
    except TarDamageError as damage:
        raise UserError(f"{where}: {damage}. Download or copy it again") from None


def _items(files: list[File], keys: list[str], labels: list[int], tar: str) -> pa.Table:
    """The table (ITEMS) of these files of a tar."""
    return pa.table(
        {
            "key": keys,
            "label": labels,
            "file": [tar] * len(files),
            "offset": [file[1] for file in files],
            "size": [file[2] for file in files],
        },
        schema=ITEMS,
    )
