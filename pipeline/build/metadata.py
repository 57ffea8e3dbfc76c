"""Metadata files beside images, as in the imagefolder layout of the Hugging Face Hub.

    metadata.csv, metadata.jsonl or metadata.parquet    one row per image: its name in the column `file_name`, relative to the
                                                        metadata file, and any other columns

There may be one in each folder. Where two have a row of the same image, the one in the deeper folder counts.
`pipeline.build.columns` chooses the column of the labels.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.build.columns import (
    CLASS_FOLDERS,
    NO_LABELS,
    Column,
    choose_label,
    class_names,
    features_of,
    find_column,
    kept_columns,
    listed,
)
from pipeline.build.file_names import is_hidden
from pipeline.dataset.fields import Fields, label_value, parse_number
from pipeline.errors import UserError
from pipeline.storage.store import Store
from pipeline.text import plural

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
LARGEST_FIELD = 1 << 24  # characters of a value in a .csv file


@dataclass
class Metadata:
    """What metadata files say about images."""

    was_read: bool = False  # whether there are any
    has_labels: bool = False
    labels: dict[str, str] = field(
        default_factory=dict
    )  # image → label as text, see `pipeline.dataset.fields`
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)  # image → values of --keep-json
    class_names: list[str] = field(default_factory=list)  # of labels that are numbers, if the files have them
    notes: list[str] = field(default_factory=list)


@dataclass
class _Table:
    """The contents of one metadata file."""

    name: str
    where: str
    columns: list[str]
    rows: list[dict[str, Any]]
    schema: pa.Schema | None = None  # of a Parquet file


@dataclass(frozen=True)
class _Columns:
    """The columns that are read."""

    file: Column
    label: Column | None
    keep: dict[str, Column]


def is_metadata(name: str) -> bool:
    return name.rpartition("/")[2] in METADATA_NAMES and not is_hidden(name)


def read_metadata(
    store: Store, names: list[str], images: list[str], fields: Fields, folders: int
) -> Metadata:
    """Read the metadata files `names` of a folder.

    Args:
        images: names of all images of the folder.
        folders: number of class folders that the images are in.

    UserError if a file is damaged, or if it is unclear what the labels are.
    """
    places = [posixpath.dirname(name) for name in names]
    if twice := next(
        (name for name, folder in zip(names, places, strict=True) if places.count(folder) > 1), None
    ):
        raise UserError(
            f"{store.describe(twice)}: there are two metadata files in its folder: remove one of them"
        )
    tables = [_read_table(store, name) for name in sorted(names, key=lambda name: (name.count("/"), name))]
    metadata = Metadata()
    columns = _choose_columns(tables[0], fields, folders, metadata)
    if columns is None:
        return metadata
    metadata.was_read = True
    metadata.has_labels = columns.label is not None
    known, found = set(images), set[str]()
    unknown: list[str] = []
    for table in tables:
        found |= _add_rows(table, columns, fields, known, metadata, unknown)
    if not found:
        raise UserError(
            f"{tables[0].where}: none of its {plural(len(unknown), 'row')} names an image of the folder, such as {unknown[0]!r}; "
            "names are relative to the metadata file"
            if unknown
            else f"{tables[0].where} has no rows"
        )
    where = " and ".join(table.name for table in tables[:2]) + (" and others" if len(tables) > 2 else "")
    if unknown:
        metadata.notes.append(
            f"{plural(len(unknown), 'row')} of {where} without an image file, such as {unknown[0]}"
        )
    if without := [name for name in images if name not in found]:
        metadata.notes.append(
            f"{plural(len(without), 'image')} without a row in {where}, such as {without[0]}"
        )
    return metadata


def _choose_columns(table: _Table, fields: Fields, folders: int, metadata: Metadata) -> _Columns | None:
    """Which columns are read; None if the file has no names of images, and nobody asked for it. Adds notes."""
    endings = [name for name in table.columns if name.endswith(f"_{FILE_NAME}")]
    if fields.image is not None:
        file = find_column(table.where, table.columns, fields.image, "--image")
    elif FILE_NAME in table.columns:
        file = Column(FILE_NAME)
    elif len(endings) == 1:
        file = Column(endings[0])
        metadata.notes.append(f"the names of the images are the column {endings[0]} of {table.name}")
    elif folders and fields == Fields():
        metadata.notes.append(
            f"{table.name} is not used, because it has no column {FILE_NAME}: --image names the column with the file names"
        )
        return None
    else:
        raise UserError(
            f"{table.where} has no column {FILE_NAME}: choose the column with the file names with --image, or ignore the file "
            f"with --label {CLASS_FOLDERS if folders else NO_LABELS} (it has {listed(endings or table.columns)})"
        )
    others = [name for name in table.columns if name != file.name and not name.endswith(FILE_NAME)]
    without = CLASS_FOLDERS if folders else NO_LABELS
    label, notes = choose_label(table.where, others, fields, table.schema, without)
    if folders and fields.label is None:
        others_note = "; the labels are the class folders" if folders > 1 else ""
        also = f"; --label {CLASS_FOLDERS} takes the class folders" if label else others_note
        notes = [f"{note}{also}" for note in notes]
    metadata.notes += notes
    if label is not None and table.schema is not None:
        metadata.class_names = class_names(features_of(table.schema), label)
    return _Columns(file, label, kept_columns(table.where, others, fields))


def _add_rows(
    table: _Table, columns: _Columns, fields: Fields, images: set[str], metadata: Metadata, unknown: list[str]
) -> set[str]:
    """Add the labels and kept values of a table. Returns its images; adds names that are no images to `unknown`."""
    wanted = [columns.file, *([columns.label] if columns.label else []), *columns.keep.values()]
    if missing := next((column.name for column in wanted if column.name not in table.columns), None):
        raise UserError(f"{table.where} has no column {missing}, which the other metadata files have")
    found: set[str] = set()
    for number, row in enumerate(table.rows):
        text = str(columns.file.value(row) or "")
        name = _image_name(posixpath.dirname(table.name), text, images)
        if name is None:
            unknown.append(text)
            continue
        label = _label(table, number, columns, row, fields)
        if name in found and label != metadata.labels[name]:
            label = _joined(table, name, metadata.labels[name], label, fields)
        found.add(name)
        metadata.labels[name] = label
        if columns.keep:
            metadata.kept[name] = {to: column.value(row) for to, column in columns.keep.items()}
    return found


def _image_name(folder: str, text: str, images: set[str]) -> str | None:
    """The image that a file name in a metadata file means, also as Windows writes it."""
    for name in (text, text.replace("\\", "/")):
        path = posixpath.normpath(posixpath.join(folder, name))
        if path in images:
            return path
    return None


def _label(table: _Table, number: int, columns: _Columns, row: dict[str, Any], fields: Fields) -> str:
    """The label of a row as text. UserError if it cannot be one."""
    if columns.label is None:
        return ""
    try:
        return label_value(columns.label.value(row), fields.label is not None)
    except ValueError as error:
        raise UserError(
            f"{table.where}, row {number}: the value of the column {columns.label.text} cannot be a label: {error}. --label "
            "chooses another column"
        ) from None


def _joined(table: _Table, name: str, first: str, second: str, fields: Fields) -> str:
    """The label of an image that has two rows with different labels: both, if images have several classes."""
    if fields.kind != "classes":
        raise UserError(
            f"{table.where} has two rows of {name} with different labels ({first or 'none'} and {second or 'none'}): remove one, "
            "or add --label-kind classes if an image may have several classes"
        )
    values = [
        json.loads(text) if text.startswith("[") else [_number(text)] for text in (first, second) if text
    ]
    return json.dumps(list(dict.fromkeys(value for part in values for value in part)), ensure_ascii=False)


def _number(text: str) -> int | float | str:
    number = parse_number(text)
    return text if number is None else number


def _read_table(store: Store, name: str) -> _Table:
    """Read a metadata file. UserError if it is damaged."""
    where = store.describe(name)
    try:
        data = store.read(name)
        if name.endswith(".parquet"):
            file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
            rows = file.read(use_threads=False).to_pylist()
            return _Table(name, where, file.schema_arrow.names, rows, file.schema_arrow)
        text = data.decode("utf-8-sig")
        return _read_csv(name, where, text) if name.endswith(".csv") else _read_jsonl(name, where, text)
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8: save it as UTF-8") from None
    except (pa.ArrowException, csv.Error, OSError) as error:
        raise UserError(f"{where} is damaged ({error}): copy it again") from None


def _read_csv(name: str, where: str, text: str) -> _Table:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    before = csv.field_size_limit(LARGEST_FIELD)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = list(reader)
    finally:
        csv.field_size_limit(before)
    columns = [column.strip() for column in reader.fieldnames or []]
    cleaned = [
        {str(key).strip(): value.strip() or None for key, value in row.items() if isinstance(value, str)}
        for row in rows
    ]
    for column in columns:
        _parse_numbers(cleaned, column)
    return _Table(name, where, columns, cleaned)


def _parse_numbers(rows: list[dict[str, Any]], column: str) -> None:
    """Make the values of a column numbers if all of them are; file names stay texts."""
    values = [row[column] for row in rows if row.get(column) is not None]
    if column.endswith(FILE_NAME) or not values or any(parse_number(value) is None for value in values):
        return
    for row in rows:
        if row.get(column) is not None:
            row[column] = parse_number(row[column])


def _read_jsonl(name: str, where: str, text: str) -> _Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{where}: line {number} is not a JSON object")
        rows.append(row)
    columns: Iterable[str] = dict.fromkeys(column for row in rows for column in row)
    return _Table(name, where, list(columns), rows)
