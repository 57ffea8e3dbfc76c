"""Parquet files as a source: one column with the images' bytes and one with labels, like datasets on the Hugging Face Hub.

A row's image is `bytes`, or a struct with `bytes` and `path`; without bytes, the file `path` beside the Parquet file. Rows
without an image are left out and listed. `pipeline.build.columns` chooses the columns. Columns are compressed per row
group, so reading one image costs a whole row group. Therefore the images of each file are first extracted ("spooled") to a
plain file:

    DEST/building/part-00000.bin       the images, one after another
    DEST/building/part-00000.parquet   where each image is (SPOOL_SCHEMA). Its metadata key `part` has name, size and columns
                                       of the Parquet file, so that a resumed build keeps it only for the same file, and what
                                       else was found in it (_Part)
"""

import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from pipeline.build import imagenet
from pipeline.build.columns import Column, choose_image, choose_label, class_names, features_of, kept_columns
from pipeline.build.file_names import file_split
from pipeline.build.image_table import (
    ITEMS,
    RangeReader,
    Source,
    SourceOptions,
    kept_arrays,
    make_source,
    with_labels,
)
from pipeline.dataset.fields import label_value
from pipeline.dataset.labels import LabelCollector, LabelEncoder
from pipeline.dataset.manifest import BUILDING, BUILDING_FOLDER, NO_LABEL
from pipeline.errors import UserError
from pipeline.parallel import ParallelMap
from pipeline.storage.parquet import parse_parquet, to_parquet
from pipeline.storage.ranged_file import RangedFile
from pipeline.storage.store import Store, open_shared, open_store

BATCH_ROWS = 64  # rows in memory at once
READ_BYTES = 1 << 20  # of a column are read at once
# ITEMS with labels as text, "" for none (see `pipeline.dataset.fields`), and the values of --keep-json as JSON.
SPOOL_SCHEMA = pa.schema(
    [
        *(pa.field("label", pa.string()) if f.name == "label" else f for f in ITEMS),
        pa.field("kept", pa.string()),
    ]
)
PART_VERSION = 2  # of the contents of parts: those of other versions are extracted again


@dataclass(frozen=True)
class _Columns:
    """The columns that are read."""

    image: str
    label: Column | None
    keep: dict[str, Column]
    is_label_chosen: bool  # by the user

    def names(self) -> list[str]:
        others = [*([self.label] if self.label else []), *self.keep.values()]
        return list(dict.fromkeys([self.image, *(column.name for column in others)]))


class _Part(BaseModel):
    """What was found in a Parquet file, besides its images."""

    file: str
    size: int  # bytes
    version: int
    columns: str  # that were read
    class_names: list[str] = []
    left_out: list[str] = []  # one line per row without an image


def parquet_source(
    store: Store, names: list[str], open_spool: Callable[[], Store], run: ParallelMap, options: SourceOptions
) -> Source:
    """The images of these Parquet files. UserError if no column contains images, or it is unclear which.

    `open_spool`: see `pipeline.build.sources.open_source`.
    """
    if options.splits != "merge":
        _check_splits(store, names)
    columns, notes = _choose_columns(store.describe(names[0]), _open(store, names[0]).schema_arrow, options)
    url = open_spool().url
    jobs = [_SpoolJob(store.url, name, url, number, columns) for number, name in enumerate(names)]
    for _ in run(spool_images, jobs):
        pass
    collector = LabelCollector(options.fields.kind)
    tables, parts = [], []
    for job in jobs:
        result = job.read_result()
        assert result is not None
        part, table = result
        collector.add(table["label"].to_pylist(), functools.partial(_place, store.describe(job.name), table))
        parts.append(part)
        tables.append(table)
    encoder = collector.encoder()
    if encoder.first_problem:
        raise UserError(f"{encoder.first_problem}; --label chooses another column")
    table = pa.concat_tables(tables)
    if not len(table):
        first = next((line for part in parts for line in part.left_out), "no rows")
        raise UserError(f"{store.url} has no images in it: {first}")
    notes += [encoder.note] if encoder.note else []
    classes, more = _classes(store, parts, encoder)
    items = with_labels(table.select(ITEMS.names), encoder.encode(table["label"].to_pylist()))
    if encoder.kind == "class" and classes and all(imagenet.WNID.fullmatch(name) for name in classes):
        keys = [
            f"{classes[label]}/{key}" if label != NO_LABEL else key
            for key, label in zip(items["key"].to_pylist(), items["label"].to_pylist(), strict=True)
        ]
        items = items.set_column(0, ITEMS.field("key"), pa.array(keys, pa.string()))
    kept = [json.loads(text) for text in table["kept"].to_pylist()] if columns.keep else []
    for name, array in kept_arrays(kept, list(columns.keep)).items():
        items = items.append_column(name, array)
    left_out = tuple(line for part in parts for line in part.left_out)
    return make_source(store.url, classes, RangeReader(url), items, [*notes, *more], left_out)


def _check_splits(store: Store, names: list[str]) -> None:
    """UserError if the files belong to several splits, such as train-00000-of-00010.parquet and test-00000-of-00001.parquet."""
    patterns = {split: pattern for split, pattern in map(file_split, names) if split}
    if len(patterns) > 1:
        splits = sorted(patterns)
        raise UserError(
            f"{store.url} has files of several splits in it ({', '.join(splits)}): choose one, such as "
            f"'{store.describe(patterns[splits[0]])}', or add --splits merge to take all of them"
        )


def _choose_columns(where: str, schema: pa.Schema, options: SourceOptions) -> tuple[_Columns, list[str]]:
    """Which columns are read, and notes on the choice."""
    fields = options.fields
    image, image_notes = choose_image(where, schema, fields)
    others = [name for name in schema.names if name != image]
    label, label_notes = choose_label(where, others, fields, schema)
    if label is not None and len(others) == 1:  # nothing to choose
        label_notes = []
    keep = kept_columns(where, others, fields)
    return _Columns(image, label, keep, fields.label is not None), [*image_notes, *label_notes]


def _classes(store: Store, parts: list[_Part], encoder: LabelEncoder) -> tuple[list[str], list[str]]:
    """The class names: those of the files' features where labels are numbers. Returns also notes."""
    named = [part for part in parts if part.class_names]
    if encoder.kind == "numbers" or encoder.by_name or not encoder.classes or not named:
        return encoder.classes, []
    names = named[0].class_names
    if other := next((part for part in named if part.class_names != names), None):
        raise UserError(
            f"{store.url}: {named[0].file} and {other.file} have different class names for the same numbers: build a dataset "
            "of each"
        )
    if len(names) < len(encoder.classes):
        highest = len(encoder.classes) - 1
        return encoder.classes, [
            f"the classes are named by their numbers, because the files name {len(names):,} classes and there is a label {highest}"
        ]
    # ImageNet on the Hub has the classes as English words, in the order of their wnids.
    is_imagenet = len(names) == len(imagenet.wnids()) and names[0].startswith("tench")
    return list(imagenet.wnids()) if is_imagenet else names, []


def _place(where: str, table: pa.Table, row: int) -> str:
    return f"{where}: {table['key'][row].as_py()}"


@dataclass(frozen=True)
class _SpoolJob:
    """One Parquet file to extract. The input of one task."""

    url: str
    name: str
    spool_url: str
    number: int
    columns: _Columns

    @property
    def part(self) -> str:
        return f"{BUILDING_FOLDER}/part-{self.number:05d}"

    def new_part(self) -> _Part:
        size = open_store(self.url, already_reached=True).size(self.name)
        return _Part(file=self.name, size=size, version=PART_VERSION, columns=repr(self.columns))

    def read_result(self) -> tuple[_Part, pa.Table] | None:
        """What was found, and where the images are (SPOOL_SCHEMA); None if they have not been extracted."""
        spool = open_store(self.spool_url, already_reached=True)
        name = f"{self.part}.parquet"
        try:
            data = spool.read(name)
        except FileNotFoundError:
            return None
        try:
            metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
            part = _Part.model_validate_json(metadata[b"part"])
        except (pa.ArrowException, KeyError, ValueError):
            return None
        if part.model_copy(update={"class_names": [], "left_out": []}) != self.new_part():
            return None
        table = parse_parquet(spool.describe(name), data, SPOOL_SCHEMA, SPOOL_SCHEMA.names)
        return part, table.replace_schema_metadata()


def spool_images(job: _SpoolJob) -> None:
    """Extract the images of a Parquet file, unless that was done before. UserError if the file is damaged."""
    if job.read_result() is not None:
        return
    store, spool = open_store(job.url, already_reached=True), open_shared(job.spool_url, BUILDING)
    file, columns, part = _open(store, job.name), job.columns, job.new_part()
    where = store.describe(job.name)
    if missing := [name for name in columns.names() if name not in file.schema_arrow.names]:
        raise UserError(
            f"{where} has no column {missing[0]}, which other files have: choose the files with a pattern"
        )
    part.class_names = class_names(features_of(file.schema_arrow), columns.label) if columns.label else []
    rows: list[dict[str, Any]] = []
    offset = 0
    with spool.staging(f"{job.part}.bin") as path, path.open("wb") as out:
        for number, row in enumerate(_rows(where, file, columns.names())):
            data, name = _image(store, job.name, row[columns.image])
            if isinstance(data, str):
                part.left_out.append(f"{job.name}, row {number}: {data}")
                continue
            stem = PurePosixPath(name).stem.replace(".", "_") if name else ""
            out.write(data)
            rows.append(
                {
                    "key": stem or f"{PurePosixPath(job.name).stem.replace('.', '_')}-{number:06d}",
                    "label": _label(where, number, columns, row),
                    "file": f"{job.part}.bin",
                    "offset": offset,
                    "size": len(data),
                    "kept": json.dumps(
                        {name: column.value(row) for name, column in columns.keep.items()}, default=str
                    ),
                }
            )
            offset += len(data)
    metadata = {"part": part.model_dump_json()}
    table = pa.Table.from_pylist(rows, schema=SPOOL_SCHEMA).replace_schema_metadata(metadata)
    spool.write(f"{job.part}.parquet", to_parquet(table))


def _image(store: Store, parquet: str, value: Any) -> tuple[bytes | str, str]:
    """The bytes of a row's image and its name, "" if it has none. Instead of bytes, why there are none."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    name = str(name or "")
    if data or not name:
        return data or "it has no image", name
    path = name if name.startswith("/") and store.is_local else str(PurePosixPath(parquet).parent / name)
    if ".." not in path.split("/"):
        folder = open_store("/") if path.startswith("/") else store
        try:
            return folder.read(path.lstrip("/")) or "its image is empty", name
        except (FileNotFoundError, IsADirectoryError):
            pass
    return f"it has no bytes, and there is no file {name} beside the Parquet file", name


def _label(where: str, number: int, columns: _Columns, row: dict[str, Any]) -> str:
    """The label of a row as text. UserError if it cannot be one."""
    if columns.label is None:
        return ""
    try:
        return label_value(columns.label.value(row), columns.is_label_chosen)
    except ValueError as error:
        raise UserError(
            f"{where}, row {number}: the value of the column {columns.label.text} cannot be a label: {error}. --label chooses "
            "another column, --label none takes none"
        ) from None


def _rows(where: str, file: pq.ParquetFile, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the values of these columns for each row. UserError if the file is damaged."""
    try:
        for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is damaged ({error}): copy it again") from None


def _open(store: Store, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            pa.PythonFile(RangedFile(store, name, window=0), mode="r"),
            pre_buffer=False,
            buffer_size=READ_BYTES,
        )
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{store.describe(name)} is damaged or not a Parquet file ({error}): copy it again"
        ) from None
