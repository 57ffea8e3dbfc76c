"""Labels of tars, Parquet files or metadata files, as text (see `pipeline.dataset.fields`), become class numbers or numbers.

What labels mean is decided from all labels of a dataset, unless --label-kind says it:

    class     one whole number or name each. Whole numbers from 0 on are kept; names are sorted and numbered
    classes   lists of whole numbers or names: any number of classes each. Lists of zeros and ones, all of one length, one
              of which has a value twice, are flags: one per class
    numbers   one or more numbers each, at least one of which is not a whole number: values to predict

Labels that contradict most others are problems, each with its place.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import pyarrow as pa

from pipeline.dataset.fields import SHOWN, parse_number
from pipeline.dataset.manifest import NO_LABEL, LabelKind, label_type
from pipeline.text import plural

MAX_CLASSES = 1_000_000  # a larger number is not a class but a mistake
Value = int | float | str


class Form(NamedTuple):
    """What kind of text a label is."""

    # "whole": class numbers; "range": whole numbers that are too large or negative; "fraction": numbers, one of them not
    # whole; "name": texts; "minus one": it alone, which is no class; "empty": a list without values.
    values: Literal["whole", "range", "fraction", "name", "minus one", "empty"]
    length: int | None  # of a list; None for a single value


@dataclass
class _Seen:
    """The labels of one form."""

    count: int
    place: str  # of the first
    label: str  # the first


@dataclass(frozen=True)
class LabelEncoder:
    """Converts labels from text, when all of them are known. See `LabelCollector.encoder`."""

    kind: LabelKind
    classes: list[str]  # see `Manifest.classes`
    by_name: bool = False  # whether labels are names; otherwise they are numbers
    flags: bool = False  # whether labels are lists with a 0 or 1 for each class
    asked: LabelKind | None = None  # --label-kind
    counts: dict[Form, int] = field(default_factory=dict)  # for messages
    first_problem: str | None = None  # the first label that contradicts the others, with its place
    note: str | None = None  # what was decided, if users may not expect it

    def encode(self, texts: list[str]) -> pa.Array:
        """Return the labels, `label_type(kind)`: NO_LABEL or null for none. They must have no problem."""
        number: dict[str, int] = {name: i for i, name in enumerate(self.classes)} if self.by_name else {}
        encoded = {text: self._encode(text, number) for text in set(texts)}
        return pa.array([encoded[text] for text in texts], label_type(self.kind))

    def _encode(self, text: str, number: dict[str, int]) -> int | list[int] | list[float] | None:
        values, _ = parse_label(text, self.split) if text else ([], False)
        if self.kind == "numbers":
            return [float(value) for value in values] or None
        if self.kind == "class":
            has_none = not values or values == [NO_LABEL]
            return NO_LABEL if has_none else number[str(values[0])] if self.by_name else int(values[0])
        if not text or values == [NO_LABEL]:
            return None
        if self.flags:
            return [place for place, value in enumerate(values) if value]
        return sorted({number[str(value)] if self.by_name else int(value) for value in values})

    @property
    def split(self) -> bool:
        """Whether texts are split into lists."""
        return self.asked in ("classes", "numbers")

    def problem(self, text: str) -> str | None:
        """Why a label contradicts the others; None if it does not."""
        return self._problem(form_of(text, self.split), text) if text else None

    def _problem(self, form: Form, text: str) -> str | None:
        label = f"label {text[:SHOWN]}{'…' * (len(text) > SHOWN)}"
        is_name = form.values == "name"
        if form.values == "empty" or (form.values == "minus one" and self.kind != "numbers"):
            return None
        if self.kind == "class" and form.length not in (None, 1):
            return f"{label} is a list, and --label-kind class means one class for each image"
        if is_name != self.by_name and not (self.asked == "class" and self.by_name):
            others = sum(count for other, count in self.counts.items() if (other.values == "name") != is_name)
            kinds = ("class name", "number")
            return (
                f"{label} is a {kinds[not is_name]}, but {others:,} of {plural(sum(self.counts.values()), 'label')} "
                f"{'is a' if others == 1 else 'are'} {kinds[is_name]}{'s' * (others != 1)} (if it is a name or a list: "
                "--label-kind class takes all labels as names, classes splits them)"
            )
        if self.kind == "numbers":
            if (form.length or 1) != len(self.classes):
                return f"{label} has {plural(form.length or 1, 'number')}, but most labels have {len(self.classes):,}"
        elif not self.by_name and form.values == "range":
            return (
                f"{label} is out of range: numbers of classes are 0 to {MAX_CLASSES - 1} (--label-kind numbers is for numbers "
                "to predict)"
            )
        elif not self.by_name and form.values == "fraction":
            return f"{label} is not a whole number, so it is no number of a class"
        return None


class LabelCollector:
    """Collects all labels of a dataset, and then decides what they mean.

    Args:
        kind: what the user says that labels mean.
    """

    def __init__(self, kind: LabelKind | None = None) -> None:
        self.kind = kind
        self.split = kind in ("classes", "numbers")
        self.seen: dict[Form, _Seen] = {}
        self.highest = -1
        self.names: set[str] = set()
        self.only_flags, self.repeats = True, False  # of lists of whole numbers

    def add(self, texts: list[str], place: Callable[[int], str]) -> None:
        """Add labels, "" for none. `place(i)` describes where the label i is: "a.tar: cat/1 at byte 0"."""
        for text, count in Counter(texts).items():
            if not text:
                continue
            values, is_list = parse_label(text, self.split)
            form = _form(values, is_list)
            if form in self.seen:
                self.seen[form].count += count
            else:
                self.seen[form] = _Seen(count, place(texts.index(text)), text)
            if form.values == "name" or self.kind == "class":
                self.names.update(map(str, values))
            if form.values == "whole":
                self.highest = max(self.highest, *map(int, values)) if values else self.highest
                self.only_flags &= is_list and all(value in (0, 1) for value in values)
                self.repeats |= len(set(values)) < len(values)

    def encoder(self) -> LabelEncoder:
        """Decide what the labels mean."""
        counts = {
            form: seen.count for form, seen in self.seen.items() if form.values not in ("minus one", "empty")
        }
        by_name = self._are_names(counts)
        kind = self.kind or self._decide_kind(by_name)
        lengths = Counter[int]()  # of labels that are numbers
        for form, seen in self.seen.items():
            if form.values not in ("name", "empty"):
                lengths[form.length or 1] += seen.count
        flags = kind == "classes" and not by_name and self.only_flags and self.repeats and len(lengths) == 1
        if kind == "numbers":
            by_name, outputs = False, lengths.most_common(1)[0][0] if lengths else 1
        else:
            outputs = min(lengths) if flags else self.highest + 1
        classes = _sorted_names(self.names - {str(NO_LABEL)}) if by_name else [str(i) for i in range(outputs)]
        encoder = LabelEncoder(kind, classes, by_name, flags, self.kind, counts, note=self._note(kind, flags))
        for form, seen in self.seen.items():
            if problem := encoder._problem(form, seen.label):
                return replace(encoder, first_problem=f"{seen.place}: {problem}")
        return encoder

    def _are_names(self, counts: dict[Form, int]) -> bool:
        """Whether labels are names: most of them, or, if the user says that they are classes, not only whole numbers."""
        if self.kind == "class":
            return any(form.values != "whole" for form in counts)
        names = sum(count for form, count in counts.items() if form.values == "name")
        others = sum(counts.values()) - names
        if names != others or not counts:
            return names > others
        # As many of each: the first label decides, unless it is a list of numbers such as "1 4 7".
        first = next(iter(counts))
        return first.values == "name" and any(map(str.isalpha, self.seen[first].label))

    def _decide_kind(self, by_name: bool) -> LabelKind:
        if not by_name and any(form.values == "fraction" for form in self.seen):
            return "numbers"
        has_lists = any(form.length is not None and (form.values == "name") == by_name for form in self.seen)
        return "classes" if has_lists else "class"

    def _note(self, kind: LabelKind, flags: bool) -> str | None:
        if flags:
            return "labels are lists of zeros and ones of one length: each has a 1 for its classes"
        if kind == "numbers" and self.kind is None:
            first = next(seen for form, seen in self.seen.items() if form.values == "fraction")
            return (
                f"labels are taken as numbers to predict, because label {first.label[:SHOWN]} of {first.place} is not a whole "
                "number (--label-kind class makes each label a class)"
            )
        return None


def parse_label(text: str, split: bool = False) -> tuple[list[Value], bool]:
    """The values of a label, and whether it is a list.

    `split`: a text is a list, too: at commas, semicolons or bars, or numbers at spaces ("1 4 7").
    """
    if text.startswith("["):
        try:
            return json.loads(text), True
        except (ValueError, RecursionError):
            pass
    if split:
        parts = re.split(r"\s*[,;|]\s*", text) if re.search("[,;|]", text) else text.split()
        values = [number for part in parts if (number := parse_number(part)) is not None]
        if len(values) == len(parts):
            return list(values), True
        return (list(filter(None, parts)) if re.search("[,;|]", text) else [text]), True
    number = parse_number(text)
    return [text if number is None else number], False


def form_of(text: str, split: bool = False) -> Form:
    """The form of a label that is not ""."""
    return _form(*parse_label(text, split))


def _form(values: list[Value], is_list: bool) -> Form:
    length = len(values) if is_list else None
    if not values or values == [NO_LABEL]:
        return Form("minus one" if values else "empty", length)
    if any(isinstance(value, str) for value in values):
        return Form("name", length)
    if any(isinstance(value, float) for value in values):
        return Form("fraction", length)
    in_range = all(0 <= int(value) < MAX_CLASSES for value in values)
    return Form("whole" if in_range else "range", length)


def _sorted_names(names: set[str]) -> list[str]:
    """Sorted as texts, or as numbers if all are."""
    numbers = {name: number for name in names if (number := parse_number(name)) is not None}
    return sorted(names, key=numbers.__getitem__ if len(numbers) == len(names) else None)
