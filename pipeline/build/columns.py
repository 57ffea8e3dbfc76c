"""Which columns of a table have the images and the labels: of Parquet files, and of metadata files beside images.

A column is chosen by --image and --label; otherwise by its name and type. Where several would do, the user must choose.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.dataset.fields import JSON_PREFIX, Fields, value_at
from pipeline.errors import UserError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")
NO_LABELS = "none"  # --label none: the dataset gets no labels
CLASS_FOLDERS = (
    "folder"  # --label folder: the labels are the class folders, also where a metadata file has labels
)
_PLAIN_NAMES = ("label", "labels", "cls", "class")
# Such as fine_label or class_id, but not num_classes or class_score.
_LABEL_NAME = re.compile(
    r"(?!(num|n)_)(.*_)?(label|class|cls)(e?s)?(_(id|idx|index|name|text|str))?", re.IGNORECASE
)
_LISTED = 12  # columns that a message names


@dataclass(frozen=True)
class Column:
    """A column, and the path of a field in it if it has objects or JSON texts. "" if the value is the column's own."""

    name: str
    path: str = ""

    @property
    def text(self) -> str:
        return f"{self.name}.{self.path}" if self.path else self.name

    def value(self, row: Mapping[str, Any]) -> Any:
        """The value of a row, None if it has none."""
        value = row.get(self.name)
        if not self.path or value is None:
            return value
        try:
            return value_at(json.loads(value) if isinstance(value, str | bytes) else value, self.path)
        except (KeyError, ValueError):
            return None


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """The features that Hugging Face's `datasets` writes into a file: column → its feature. Empty if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def class_names(features: dict[str, Any], column: Column) -> list[str]:
    """The class names of a column whose feature is ClassLabel, or a list of these. Empty if it is another."""
    feature = features.get(column.name)
    for part in column.path.split(".") if column.path else ():
        feature = feature.get(part) if isinstance(feature, dict) else None
    while not (isinstance(feature, dict) and "names" in feature):
        if isinstance(feature, list) and len(feature) == 1:
            (feature,) = feature
        elif isinstance(feature, dict) and "feature" in feature:
            feature = feature["feature"]
        else:
            return []
    names = feature["names"]
    return [str(name) for name in names] if isinstance(names, list) else []


def find_column(where: str, names: list[str], chosen: str, option: str) -> Column:
    """The column that an option names: "label", "meta.label" or "json:meta.label". UserError if there is none."""
    text = chosen.removeprefix(JSON_PREFIX)
    if text in names:
        return Column(text)
    for end in reversed([dot.start() for dot in re.finditer(r"\.", text)]):
        if text[:end] in names:
            return Column(text[:end], text[end + 1 :])
    if chosen.startswith(JSON_PREFIX) and "json" in names:
        return Column("json", text)
    raise UserError(f"{where} has no column {text} ({option}); it has {listed(names)}")


def choose_image(where: str, schema: pa.Schema, fields: Fields) -> tuple[str, list[str]]:
    """Return the name of the column with the images, and notes. UserError if there is none, or it is unclear."""
    if fields.image is not None:
        name = find_column(where, schema.names, fields.image, "--image").name
        if not holds_images(schema.field(name).type):
            raise UserError(_type_message(where, schema, name))
        return name, []
    typed = [field.name for field in schema if holds_images(field.type)]
    features = features_of(schema)
    named = [name for name in typed if name.lower() in IMAGE_COLUMNS]
    candidates = named or [name for name in typed if _looks_like_image(schema, features, name)]
    if len(candidates) > 1:
        raise UserError(
            f"{where} has several columns of images: choose one with --image: {listed(candidates)}"
        )
    if not candidates:
        if wrong := next((name for name in schema.names if name.lower() in IMAGE_COLUMNS), None):
            raise UserError(_type_message(where, schema, wrong))
        raise UserError(
            f"{where} has no image column (expected {', '.join(IMAGE_COLUMNS)}, or choose one with --image; it has "
            f"{listed(schema.names)})"
        )
    others = [name for name in typed if name != candidates[0]]
    if not others and named:
        return candidates[0], []
    also = f"; --image chooses another: {listed(others)}" if others else ""
    return candidates[0], [f"the images are the column {candidates[0]}{also}"]


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type may have images: their bytes, or a struct with `bytes`."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_binary(kind.field(place).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _looks_like_image(schema: pa.Schema, features: dict[str, Any], name: str) -> bool:
    feature = features.get(name)
    is_feature = isinstance(feature, dict) and feature.get("_type") == "Image"
    return is_feature or pa.types.is_struct(schema.field(name).type) or "image" in name.lower()


def _type_message(where: str, schema: pa.Schema, name: str) -> str:
    return f"{where}: the column {name} has the type {schema.field(name).type}, expected the images' bytes"


def choose_label(
    where: str, names: list[str], fields: Fields, schema: pa.Schema | None = None, without: str = NO_LABELS
) -> tuple[Column | None, list[str]]:
    """Return the column with the labels, None without labels, and notes. UserError if it is unclear.

    Args:
        names: of all columns but that of the images.
        schema: of the columns, if their types are known.
        without: the value of --label that takes none of the columns.
    """
    if fields.label in (NO_LABELS, CLASS_FOLDERS) and fields.label not in names:
        return None, []
    if fields.label is not None:
        return find_column(where, names, fields.label, "--label"), []
    features = features_of(schema) if schema is not None else {}
    declared = {name for name in names if class_names(features, Column(name))}
    candidates = [name for name in names if name in declared or _LABEL_NAME.fullmatch(name)]
    if schema is not None:
        candidates = [name for name in candidates if not _is_no_label(schema.field(name).type)]
    sure = [name for name in candidates if name in declared or name.lower() in _PLAIN_NAMES]
    candidates = sure if len(sure) == 1 else candidates
    if len(candidates) > 1:
        raise UserError(
            f"{where} has several columns that may be labels: choose one with --label: {listed(candidates)} (or --label "
            f"{without})"
        )
    if not candidates:
        note = f"no column of {where} is called a label; --label chooses one: {listed(names)}"
        return None, [note] if names else []
    others = [name for name in names if name != candidates[0]]
    also = f"; --label chooses another: {listed(others)}" if others else ""
    note = f"the labels are the column {candidates[0]} of {where}{also}"
    return Column(candidates[0]), [note]


def _is_no_label(kind: pa.DataType) -> bool:
    """Whether values of this type are no labels."""
    return bool(
        pa.types.is_struct(kind) or pa.types.is_map(kind) or _is_binary(kind) or pa.types.is_temporal(kind)
    )


def kept_columns(where: str, names: list[str], fields: Fields) -> dict[str, Column]:
    """The columns that --keep-json names: name in the index → column."""
    return {name: find_column(where, names, path, "--keep-json") for name, path in fields.columns.items()}


def listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
