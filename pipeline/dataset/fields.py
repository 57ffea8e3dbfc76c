"""Which fields of a source become the image, the label and extra columns, and what value can be a label.

The same options serve every source with fields: WebDataset tars, Parquet files, and metadata.csv or .jsonl beside images.

    --image rgb.jpg                              extension of a tar's files, or a column
    --label cls, --label json:path.to.field      extension of a tar's files, a field of their .json files, or a column
    --label-kind class, classes or numbers       what labels mean; otherwise decided from all of them, see `labels`
    --keep-json score,name=path.to.field         fields of .json files, or columns, that become columns of the index
    --split-at first-dot or last-dot             where the name of a sample ends in a tar: WebDataset's rule, or for names
                                                 with dots

Labels are text between a source and `pipeline.dataset.labels.LabelEncoder`, because names get their numbers only when all
of them are known: "" for none, "3", "0.5", "dog", or a list as JSON: "[0, 2]". Kept values are JSON text, too, "" for none, until
the type of their column is known: true or false, whole numbers, numbers, or, where values differ in kind, text.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa

from pipeline.dataset.manifest import INDEX_SCHEMA, LabelKind
from pipeline.errors import UserError

JSON_PREFIX = "json:"
WHOLE_NUMBER = re.compile(r"[-+]?[0-9]+(\.0*)?")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
EXACT_DIGITS = 15  # a whole number with more is a float
KEPT_TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string()}
INT64 = 1 << 63
CONDITION_COLUMNS = ("shard", "label_number")  # that `shards view --where` has besides those of the index
SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class Fields:
    """Which fields of a source are used. None: the source's default."""

    image: str | None = None  # extension in lower case, without a dot in front ("rgb.jpg"), or a column
    label: str | None = None  # extension, "json:path.to.field", or a column
    kind: LabelKind | None = None  # what labels mean
    keep: tuple[str, ...] = ()  # "score" or "name=path.to.field", see `columns`
    split_at: Literal["first-dot", "last-dot"] = "first-dot"  # where the key ends in the file names of a tar

    @property
    def label_path(self) -> str | None:
        """The path of the label in .json files, if it is there."""
        return (
            self.label.removeprefix(JSON_PREFIX)
            if self.label and self.label.startswith(JSON_PREFIX)
            else None
        )

    @property
    def images(self) -> tuple[str, ...]:
        """The extensions that `image` lists, best first: "jpg,png" for the one of them that a sample has."""
        return tuple(
            part.strip().lstrip(".").lower() for part in (self.image or "").split(",") if part.strip()
        )

    @property
    def columns(self) -> dict[str, str]:
        """Name of each kept column → its path in the .json file, or its column in the source."""
        return dict(map(_column, self.keep))


def parse_fields(
    image: str | None = None,
    label: str | None = None,
    kind: LabelKind | None = None,
    keep: str | None = None,
    split_at: Literal["first-dot", "last-dot"] = "first-dot",
) -> Fields:
    """The fields that --image, --label, --label-kind, --keep-json and --split-at choose. UserError if one is not valid."""
    if image is not None:
        image = image.strip().lstrip(".")
        if not image.strip(","):
            raise UserError("--image is empty: give an extension such as rgb.jpg, or the name of a column")
    if label is not None:
        label = label.strip()
        if not label.removeprefix(JSON_PREFIX).strip("."):
            raise UserError(
                f"--label {label!r} names no field: give an extension such as cls, a field such as json:path.to.field, or the "
                "name of a column"
            )
        if not label.startswith(JSON_PREFIX):
            label = label.lstrip(".")
    if kind is not None and kind not in get_args(LabelKind):
        raise UserError(f"--label-kind {kind}: expected {', '.join(get_args(LabelKind))}")
    kept = tuple(part.strip() for part in (keep or "").split(",") if part.strip())
    if keep is not None and not kept:
        raise UserError("--keep-json is empty: give the names of fields, such as score,caption")
    names: set[str] = set()
    for text in kept:
        name, path = _column(text)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not path:
            raise UserError(
                f"--keep-json {text}: a column's name has letters, digits and underscores; choose one with NAME=FIELD"
            )
        if name in (*INDEX_SCHEMA.names, *CONDITION_COLUMNS):
            raise UserError(
                f"--keep-json {text}: the index has a column {name} of its own; choose another name, such as "
                f"--keep-json json_{name}={path}"
            )
        if name in names:
            raise UserError(f"--keep-json has two columns {name}: give one another name, NAME=FIELD")
        names.add(name)
    return Fields(image, label, kind, kept, split_at)


def _column(text: str) -> tuple[str, str]:
    """Name and path of "score", "meta.score" (name: meta_score) or "name=meta.score"."""
    name, equals, path = text.partition("=")
    if equals:
        return name.strip(), path.strip()
    return re.sub(r"[^A-Za-z0-9_]", "_", text), text


def value_at(tree: Any, path: str) -> Any:
    """The value at a path such as "labels.0.name" of a parsed .json file. KeyError, with the reason, if there is none.

    A key may itself contain dots: the longest key that fits is taken.
    """
    rest = path
    while rest:
        key = ""
        if isinstance(tree, Mapping):
            ends = [len(rest), *(dot.start() for dot in reversed(list(re.finditer(r"\.", rest))))]
            key = next((rest[:end] for end in ends if rest[:end] in tree), "")
        elif isinstance(tree, list):
            key = rest.partition(".")[0]
            key = key if key.isdecimal() and int(key) < len(tree) else ""
        if not key:
            raise KeyError(f"no field {path}")
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
        rest = rest[len(key) + 1 :]
    return tree


def label_value(value: Any, chosen: bool = False) -> str:
    """Return a label from any source as text, "" for none: see the top of this module.

    Whole numbers lose a fraction of zeros, so 3, 3.0, "3" and "3.0" are one label. None and NaN are no label.

    Args:
        value: from Python, NumPy, JSON, CSV or Arrow.
        chosen: whether the user named the field. Only then are true and false the classes 1 and 0: a field that just
            happens to be called "label" may be a flag.

    ValueError, with the reason, if it cannot be a label.
    """
    if isinstance(value, str):  # first, because it is the most common
        return _text_value(value)
    if hasattr(value, "as_py"):  # of Arrow
        value = value.as_py()
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    if value is None:
        return ""
    if isinstance(value, list | tuple | set | frozenset):
        return _list_value(sorted(value) if isinstance(value, set | frozenset) else value, chosen)
    number = _scalar(value, chosen)
    return "" if number is None else str(number)


def parse_number(text: str) -> int | float | None:
    """The number that a text is, a whole one as int; None if it is another text."""
    if WHOLE_NUMBER.fullmatch(text) and len(text) < EXACT_DIGITS:
        return int(text.partition(".")[0])
    return _plain(float(text)) if NUMBER.fullmatch(text) else None


def _plain(number: float) -> int | float:
    """A whole number as int, if it is exact."""
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _text_value(text: str) -> str:
    text = text.strip()
    if len(text) < EXACT_DIGITS and text.isascii() and text.isdigit():  # the most common
        return str(int(text))
    if not text.isprintable() or "\ufffd" in text:
        raise ValueError("it is not printable UTF-8")
    if text.startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return _list_value(values, chosen=True)
    number = parse_number(text)
    if number is not None and math.isinf(number):
        raise ValueError(f"{text[:SHOWN]} is infinite")
    return text if number is None else str(number)


def _list_value(values: Any, chosen: bool) -> str:
    scalars = []
    for value in values:
        scalar = _scalar(value, chosen)
        if scalar is None or scalar == "":
            raise ValueError(f"a value of the list {_shown(values)} is missing")
        scalars.append(scalar)
    if len({isinstance(scalar, str) for scalar in scalars}) > 1:
        if all(isinstance(value, str) for value in values):  # names, some of which look like numbers
            return json.dumps([_text_value(value) for value in values], ensure_ascii=False)
        raise ValueError(f"the list {_shown(values)} has numbers and texts")
    return json.dumps(scalars, ensure_ascii=False)


def _scalar(value: Any, chosen: bool) -> int | float | str | None:
    """A number, a text, or None for no label. ValueError if it is neither."""
    if isinstance(value, bool):
        if not chosen:
            raise ValueError(
                f"{str(value).lower()} may be a flag; to use it as class 0 or 1, name its field with --label"
            )
        return int(value)
    if value is None or (isinstance(value, int) and abs(value) < 10 ** (EXACT_DIGITS - 2)):
        return value
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        text = _text_value(value)
        number = parse_number(text)
        return text if number is None else number
    if isinstance(value, Mapping):
        fields = ", ".join(list(map(str, value))[:5])
        hint = f"; choose a field of it: {fields}" if fields else ""
        raise ValueError(f"it is an object{hint}")
    if isinstance(value, list | tuple):
        raise ValueError(f"a list in a list: {_shown(value)}")
    try:
        number = float(value)  # also of Decimal
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        raise ValueError(f"{_shown(value)} is neither a number, a text nor a list") from None
    if math.isnan(number):
        return None
    if math.isinf(number):
        raise ValueError(f"{_shown(value)} is infinite")
    return _plain(number)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


# ---- values that are kept ---------------------------------------------------------------------------------------


def kept_kind(value: Any) -> str:
    """The kind of a value: "bool", "int", "float", "text", or "other" for lists and objects; "" for a missing one."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -INT64 <= value < INT64 else "float"
    return {float: "float", str: "text"}.get(type(value), "other")


def kept_type(kinds: Counter[str]) -> str:
    """The type, a key of KEPT_TYPES, of a column with so many values of each kind."""
    found = {kind for kind, count in kinds.items() if count and kind}
    if found == {"int", "float"}:
        return "float"
    return found.pop() if len(found) == 1 and found <= set(KEPT_TYPES) else "text"


def kept_text(value: Any) -> str:
    """A value as JSON text."""
    return "" if value is None else json.dumps(value)


def kept_array(texts: Iterable[str], kind: str) -> pa.Array:
    """The column of a type from JSON texts, null for ""."""
    values = [json.loads(text) if text else None for text in texts]
    if kind == "float":
        values = [None if value is None else _float(value) for value in values]
    if kind == "text":
        values = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        # UTF-8 has no lone surrogates, which JSON may have.
        values = [v if v is None else v.encode("utf-8", "replace").decode() for v in values]
    return pa.array(values, KEPT_TYPES[kind])


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # a whole number of more than 300 digits
        return math.inf if number > 0 else -math.inf


def kept_type_name(kind: pa.DataType) -> str:
    """The key of KEPT_TYPES of a column's type; "text" for any other type."""
    return next((name for name, other in KEPT_TYPES.items() if other == kind), "text")
