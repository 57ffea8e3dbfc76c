"""Labels of WebDataset or Parquet data: numbers, or class names that become numbers."""

import re

import pyarrow as pa

from pipeline.dataset.manifest import NO_LABEL

MAX_CLASSES = 1_000_000  # a larger number is not a class but a mistake


class LabelEncoder:
    """Converts labels from text to class numbers.

    Numeric labels are kept. Class names are sorted and numbered from 0. The first label decides which of the two a
    dataset has. First `add` all labels, then `encode` them.
    """

    def __init__(self) -> None:
        self.is_numeric: bool | None = None  # None before the first label
        self.highest = -1
        self.names: set[str] = set()

    def add(self, label: str) -> str | None:
        """Register a label, "" for none. Returns what is wrong with it, or None."""
        if not label:
            return None
        is_number = re.fullmatch(r"-?[0-9]+", label) is not None
        if self.is_numeric is None:
            self.is_numeric = is_number
        if is_number != self.is_numeric:
            kinds = ("a class name", "a number")
            return (
                f"label {label[:40]} is {kinds[is_number]}, but the first label is {kinds[self.is_numeric]}"
            )
        if is_number and not (len(label) < 10 and 0 <= int(label) < MAX_CLASSES):
            return f"label {label[:40]} is out of range: numeric labels are 0 to {MAX_CLASSES - 1}"
        if is_number:
            self.highest = max(self.highest, int(label))
        else:
            self.names.add(label)
        return None

    def encode(self, labels: list[str]) -> pa.Array:
        """Return the class number of each label, int32; NO_LABEL for ""."""
        number = {name: i for i, name in enumerate(sorted(self.names))}
        return pa.array(
            [(number[label] if self.names else int(label)) if label else NO_LABEL for label in labels],
            pa.int32(),
        )

    def classes(self) -> list[str]:
        """The name of each class. The name of a numeric class is its number."""
        return sorted(self.names) if self.names else [str(i) for i in range(self.highest + 1)]
