"""One sample of a WebDataset tar: which of its files is the image, what its label is, and which values are kept.

Image: by default the only one, or the plain one whose extension comes first in IMAGE_TYPES. A plain extension has no dot:
`jpg`, not `rgb.jpg`. Without a plain one, several images are an error, because they may be fields of one sample, or
samples whose names have dots: --image or --split-at says which.

Label: by default the `.cls` file, or else the first of JSON_FIELDS in the `.json` file that can be a label.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from pipeline.dataset.fields import Fields, label_value, value_at
from pipeline.errors import UserError
from pipeline.images.formats import EXTENSIONS, ImageInfo

IMAGE_TYPES = tuple(EXTENSIONS)  # file extensions, best first
JSON_FIELDS = ("label", "cls", "class")


@dataclass
class Candidate:
    """A file that may be the sample's image."""

    extension: str
    row: dict[str, Any]  # its columns of the index
    info: ImageInfo | None  # what its header says; None if it cannot be read
    problem: str | None = None  # why it cannot be read

    @property
    def prefix(self) -> str:
        """What is before the last dot of the extension: "rgb" of "rgb.jpg"."""
        return self.extension.rpartition(".")[0]

    @property
    def type(self) -> str:
        return self.extension.rpartition(".")[2]


@dataclass
class TarSample:
    """The sample whose files are being read."""

    key: str
    begin: int  # byte of its first header
    extensions: set[str] = field(default_factory=set)
    problem: str | None = None  # the first one found
    candidates: list[Candidate] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)  # extension → contents of the files that are read

    def image(self, fields: Fields, where: str) -> Candidate | None:
        """The sample's image, or None. Sets `problem` if it cannot be read. UserError if it is unclear which it is.

        `where`: the tar's name and the sample, for messages.
        """
        chosen = self._chosen(fields.images, where)
        if chosen is not None and chosen.problem:
            self.problem = self.problem or chosen.problem
        return chosen

    def _chosen(self, wanted: tuple[str, ...], where: str) -> Candidate | None:
        if wanted:
            return min(self.candidates, key=lambda c: wanted.index(c.extension), default=None)
        # A .npy file beside another image may be anything: it matters only if it is the only one.
        images = [c for c in self.candidates if c.type != "npy" or not c.problem] or self.candidates
        plain = [c for c in images if not c.prefix]
        if not plain and len({c.prefix for c in images}) > 1:
            one, two = sorted(c.extension for c in images)[:2]
            are_numbers = all(c.prefix.replace(".", "").isdigit() for c in images)  # 22.05.png and 22.06.png
            choose = "" if are_numbers else f"To use one of them, choose it with --image {one}; if "
            raise UserError(
                f"{where} has {len(images)} images, .{one} and .{two}: the name of a sample ends at its first dot. "
                f"{choose or 'If '}dots are part of the names and each image is a sample, pass --split-at last-dot"
            )
        found = min(plain or images, key=lambda c: IMAGE_TYPES.index(c.type), default=None)
        if found is not None and found.prefix:
            for kind in ("cls", "json", "txt"):
                if f"{found.prefix}.{kind}" in self.extensions:
                    raise UserError(
                        f"{where} has files .{found.extension} and .{found.prefix}.{kind}: the name of a sample ends at its "
                        "first dot. If dots are part of the names, pass --split-at last-dot; otherwise choose the image with "
                        f"--image {found.extension}"
                    )
        return found

    def label(self, fields: Fields) -> tuple[str, str | None]:
        """The label as text (see `label_value`), "" for none, and why there is none if a value is there.

        ValueError, with the reason, if the file with the label is damaged.
        """
        path = fields.label_path
        if path is None and (extension := fields.label or "cls") in self.texts:
            try:
                text = self.texts[extension].decode("utf-8", "replace").strip()
                if not text:
                    raise ValueError("it is empty")
                return label_value(text, chosen=True), None
            except ValueError as error:
                raise ValueError(f"its .{extension} file cannot be a label: {error}") from None
        if fields.label and path is None:
            return "", f"there is no .{fields.label} file"
        if "json" not in self.texts:
            return "", "there is no .json file" if path else None
        tree = self._json()
        return _json_label(tree) if path is None else _chosen_label(tree, path)

    def kept(self, fields: Fields) -> dict[str, Any]:
        """The value of each kept column, None if it is missing. ValueError if the .json file is damaged."""
        if not fields.keep:
            return {}
        tree = self._json() if "json" in self.texts else {}
        values = {}
        for name, path in fields.columns.items():
            try:
                values[name] = value_at(tree, path)
            except KeyError:
                values[name] = None
        return values

    def _json(self) -> Any:
        try:
            return json.loads(self.texts["json"])
        except (ValueError, RecursionError):
            raise ValueError("its .json file is not valid JSON") from None


def is_read(extension: str, fields: Fields) -> bool:
    """Whether the contents of a file are needed for the label or for kept values."""
    if extension == "json":
        return fields.label is None or fields.label_path is not None or bool(fields.keep)
    return extension == (fields.label or "cls")


def is_candidate(extension: str, fields: Fields) -> bool:
    """Whether a file may be the image."""
    if fields.images:
        return extension in fields.images
    return extension.rpartition(".")[2] in IMAGE_TYPES


def _chosen_label(tree: Any, path: str) -> tuple[str, str | None]:
    try:
        value = value_at(tree, path)
    except KeyError as error:
        return "", f"the .json file has {error.args[0]}"
    return _label_or_reason(path, value, chosen=True)


def _json_label(tree: Any) -> tuple[str, str | None]:
    """The first of JSON_FIELDS that is a label; otherwise why the first of them is none."""
    first_reason = None
    for name in JSON_FIELDS if isinstance(tree, dict) else ():
        if name in tree:
            text, reason = _label_or_reason(name, tree[name], chosen=False)
            if text:
                return text, None
            first_reason = first_reason or reason
    return "", first_reason


def _label_or_reason(name: str, value: Any, chosen: bool) -> tuple[str, str | None]:
    try:
        text = label_value(value, chosen)
    except ValueError as error:
        return "", f"the field {name} of the .json file cannot be a label: {error}"
    return text, None if text else f"the field {name} of the .json file is {json.dumps(value)}"
