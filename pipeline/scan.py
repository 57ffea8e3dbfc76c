"""One shard made by others: its samples, by WebDataset's rules, and what is damaged.

A key is a path up to the first dot of its file name, the extension is the rest in lower case, and the files of a
sample follow each other. Of several images of a sample the first of IMAGES counts. A label is the `.cls` (a
number, or a class name), else the first of JSON_FIELDS in the `.json` that is a whole number or a text.
"""

import hashlib
import json
import re
import tarfile
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from crc32c import crc32c

from pipeline.errors import UserError
from pipeline.image_size import image_size
from pipeline.manifest import INDEX_SCHEMA
from pipeline.storage import Store
from pipeline.tars import COMPRESSED, RangedFile, TarDamageError, tar_members

IMAGES = ("jpg", "jpeg", "png", "webp")
JSON_FIELDS = ("label", "cls", "class")
MAX_LABEL_FILE = 1 << 20  # bytes of a .cls or .json
NAMED = 20  # of what is left out so many are named

# An index whose labels are still text, "" for none.
ROWS_SCHEMA = pa.schema([pa.field("label", pa.string()) if f.name == "label" else f for f in INDEX_SCHEMA])


@dataclass
class LeftOut:
    """Damaged samples. The first is an error, unless they may be skipped."""

    skip: bool
    count: int = 0
    named: list[str] = field(default_factory=list)  # the first NAMED, a line each

    def add(self, line: str) -> None:
        if not self.skip:
            raise UserError(f"{line}. Mend it, or leave out what is damaged with --skip-damaged")
        self.count += 1
        self.named = [*self.named, line][:NAMED]

    def merge(self, other: "LeftOut") -> None:
        self.count += other.count
        self.named = (self.named + other.named)[:NAMED]


@dataclass
class Scanned:
    """What is in one shard."""

    name: str
    bytes: int
    left_out: LeftOut
    rows: pa.Table = None  # ROWS_SCHEMA, in the tar's order
    sha256: str = ""
    without_image: int = 0  # samples
    other_files: int = 0  # such as ._name and names without an extension
    webp: int = 0  # images


@dataclass
class _Sample:
    """The sample whose files are going by."""

    key: str
    begin: int  # byte of its first header
    extensions: set[str] = field(default_factory=set)
    problem: str | None = None
    image: str | None = None  # extension of the best image so far
    row: dict[str, Any] = field(default_factory=dict)
    cls: str | None = None
    json: bytes | None = None


def scan_shard(store: Store, name: str, checksums: bool, skip_damaged: bool) -> Scanned:
    """Read the headers of one tar, and all its bytes if `checksums`. UserError where it is damaged, or with
    `skip_damaged` only where it is missing or compressed."""
    digest = hashlib.sha256() if checksums else None
    try:
        file = RangedFile(store, name, digest)
        if file.at(0, 8).startswith(COMPRESSED):
            raise UserError(compressed(store, name))
        scan = _scan(file, LeftOut(skip_damaged))
        if digest is not None:
            file.at(file.size - 1, 1)  # what follows a damaged header belongs to the digest too
            scan.sha256 = digest.hexdigest()
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)} is gone since the folder was listed") from None
    return scan


def compressed(store: Store, name: str) -> str:
    return (
        f"{store.describe(name)} is compressed, so nothing can be read from its middle: unpack it (the images "
        "in it are compressed already)"
    )


def _scan(file: RangedFile, left_out: LeftOut) -> Scanned:
    scan = Scanned(file.name, file.size, left_out)
    begins: dict[str, int] = {}  # of each key
    rows: list[dict[str, Any]] = []
    sample: _Sample | None = None

    def finish(sample: _Sample) -> None:
        first = begins.setdefault(sample.key, sample.begin)
        if first != sample.begin:
            again = f"the key is there already, at byte {first} (a sample's files must follow each other: "
            sample.problem = f"{again}tar --sort=name)"
        label = _label(sample)
        if sample.problem:
            left_out.add(f"{describe(file.name, sample.key, sample.begin)}: {sample.problem}")
        elif sample.image is None:
            scan.without_image += 1
        else:
            rows.append({"key": sample.key, **sample.row, "label": label})
            scan.webp += sample.image == "webp"

    try:
        for member in tar_members(file):
            if member.isdir():
                continue
            key, extension = split_name(member.name)
            if not key:
                scan.other_files += 1
                continue
            if sample is None or sample.key != key:
                if sample is not None:
                    finish(sample)
                sample = _Sample(key, member.offset)
            _take(file, sample, member, extension)
        if sample is not None:
            finish(sample)
    except TarDamageError as damage:
        # More files of the sample under way may have followed: it goes with the rest.
        at = (
            f"in or after {printable(sample.key)} at byte {sample.begin}" if sample else "at its first header"
        )
        left_out.add(f"{file.name}: {damage}, {at}; what follows cannot be read")
    scan.rows = pa.Table.from_pylist(rows, schema=ROWS_SCHEMA)
    return scan


def describe(shard: str, key: str, byte: int) -> str:
    return f"{shard}: {printable(key)} at byte {byte}"


def printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension; no key where WebDataset sees none, or would skip the file."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or re.match(r"__[^/]*__($|/)", name):
        return "", ""
    return folder + slash + stem, extension.lower()


def _take(file: RangedFile, sample: _Sample, member: tarfile.TarInfo, extension: str) -> None:
    """Note what one file says of its sample."""
    sample.problem = sample.problem or _refusal(member)
    if extension in sample.extensions:
        sample.problem = sample.problem or f"it has two files .{extension}"
    sample.extensions.add(extension)
    if not member.isreg() or member.issparse():
        return
    if member.offset_data + member.size > file.size:
        what = f"it ends too early, at byte {file.size}, in the middle of {printable(member.name)}"
        raise TarDamageError(what)
    if extension in ("cls", "json"):
        if member.size > MAX_LABEL_FILE:
            sample.problem = sample.problem or f"its .{extension} has {member.size} bytes"
        elif extension == "cls":
            sample.cls = file.at(member.offset_data, member.size).decode("utf-8", "replace").strip()
        else:
            sample.json = file.at(member.offset_data, member.size)
    elif extension in IMAGES and not sample.problem:
        try:
            row = _read_image(file, member)
        except ValueError as error:
            sample.problem = f"{printable(member.name)}: {error}"
        else:
            if sample.image is None or IMAGES.index(extension) < IMAGES.index(sample.image):
                sample.image, sample.row = extension, row


def _refusal(member: tarfile.TarInfo) -> str | None:
    """Why a file is not taken, from its header alone."""
    name = printable(member.name)
    if not member.name.isprintable():
        return "its name is not printable UTF-8"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"its name {name} is absolute or has .. in it"
    if member.issym() or member.islnk():
        return f"{name} is a link to {printable(member.linkname)} (tar with --dereference --hard-dereference)"
    if member.issparse():
        return f"{name} is a sparse file (tar without --sparse)"
    if not member.isreg():
        return f"{name} is not a file"
    return None


def _read_image(file: RangedFile, member: tarfile.TarInfo) -> dict[str, int]:
    """Its columns of the index. ValueError with what is wrong with it."""
    offset, size = member.offset_data, member.size
    if size == 0:
        raise ValueError("it is empty")
    if size >= 2**31:
        raise ValueError("it is larger than 2 GiB")
    crc = 0
    if file.digest is None:
        width, height = image_size(lambda n: file.at(offset, n), size)
    else:
        data = file.at(offset, size)
        crc = crc32c(data)
        width, height = image_size(lambda n: data[:n], size)
    return {"offset": offset, "size": size, "width": width, "height": height, "crc32c": crc}


def _label(sample: _Sample) -> str:
    """The label as text, "" for none or -1; notes a problem where it cannot be read."""
    text, problem = "", None
    if sample.cls is not None:
        text = sample.cls
        if not text or not text.isprintable() or "\ufffd" in text:
            problem = "its .cls is empty or not printable UTF-8"
    elif sample.json is not None:
        try:
            tree = json.loads(sample.json)
        except (ValueError, RecursionError):
            problem = "its .json cannot be read"
        else:
            values = [tree.get(name) for name in JSON_FIELDS] if isinstance(tree, dict) else []
            texts = [str(v).strip() for v in values if isinstance(v, int | str) and not isinstance(v, bool)]
            text = texts[0] if texts else ""
            problem = None if text.isprintable() else "the label in its .json is not printable"
    sample.problem = sample.problem or problem
    return "" if text == "-1" else text
