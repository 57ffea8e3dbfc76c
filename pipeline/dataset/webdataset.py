"""Scan a WebDataset tar: find its samples and labels, and report damage.

WebDataset's rules: a sample is a group of adjacent files with the same key. The key is the file's path up to the first
dot of the file name; the rest, in lower case, is the extension. So `cat/1.jpg` and `cat/1.cls` are the sample `cat/1`.

If a sample has several images, the one whose extension comes first in IMAGE_TYPES is used. The label is the text of the
`.cls` file: a number or a class name. Without a `.cls` file it is the first of JSON_FIELDS in the `.json` file that is
an integer or a text.
"""

import contextlib
import hashlib
import json
import re
import tarfile
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from crc32c import crc32c

from pipeline.dataset.fields import label_value
from pipeline.dataset.manifest import INDEX_SCHEMA
from pipeline.errors import UserError
from pipeline.images.convert import significant_bits
from pipeline.images.formats import EXTENSIONS, ImageInfo, image_info, read_pixels
from pipeline.images.kinds import ImageKinds, bits_of
from pipeline.parallel import THREADS, map_ahead
from pipeline.storage.ranged_file import RangedFile
from pipeline.storage.store import Store
from pipeline.storage.tar_reader import COMPRESSED, TarDamageError, tar_members

IMAGE_TYPES = tuple(EXTENSIONS)  # file extensions, best first
MAX_DEEP = 64  # 16-bit images whose values are looked at to find how many bits they use
JSON_FIELDS = ("label", "cls", "class")
MAX_LABEL_FILE = 1 << 20  # largest .cls or .json file in bytes
MAX_LISTED = 20  # skipped samples that are listed by name

# INDEX_SCHEMA with labels as text, "" for none.
ROWS_SCHEMA = pa.schema([pa.field("label", pa.string()) if f.name == "label" else f for f in INDEX_SCHEMA])


@dataclass
class SkippedSamples:
    """Damaged samples. Unless they may be skipped, the first one is an error."""

    allowed: bool
    count: int = 0
    listed: list[str] = field(default_factory=list)  # the first MAX_LISTED, one line each

    def add(self, line: str) -> None:
        """Count a damaged sample; `line` describes it. UserError if samples may not be skipped."""
        if not self.allowed:
            raise UserError(f"{line}. Repair the file, or pass --skip-damaged to skip damaged samples")
        self.count += 1
        self.listed = [*self.listed, line][:MAX_LISTED]

    def merge(self, other: "SkippedSamples") -> None:
        self.count += other.count
        self.listed = (self.listed + other.listed)[:MAX_LISTED]


@dataclass
class ScannedShard:
    """The samples of one tar."""

    name: str
    bytes: int
    skipped: SkippedSamples
    rows: pa.Table = None  # ROWS_SCHEMA, in the tar's order
    sha256: str = ""  # of the tar; "" if its bytes were not read
    without_image: int = 0  # number of samples without an image; they are not in `rows`
    other_files: int = 0  # number of files that belong to no sample, such as ._name
    kinds: ImageKinds = field(default_factory=ImageKinds)  # types of its images
    # (offset, size in bytes) of some 16-bit images whose files do not say how many bits are used.
    deep: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Sample:
    """The sample whose files are being read."""

    key: str
    begin: int  # byte of its first header
    extensions: set[str] = field(default_factory=set)
    problem: str | None = None  # the first one found
    image: str | None = None  # extension of the best image so far
    row: dict[str, Any] = field(default_factory=dict)  # its columns of the index, see _read_image
    info: ImageInfo | None = None  # what its header says
    # Extension of the best image that cannot be read, and the reason. It matters only if there is no better image: a .npy
    # file beside a .jpg may be anything.
    unreadable: tuple[str, str] | None = None
    cls: str | None = None
    json: bytes | None = None


def scan_shard(store: Store, name: str, checksums: bool, skip_damaged: bool) -> ScannedShard:
    """Find the samples of a tar. Reads its headers, or with `checksums` all of its bytes.

    UserError if the tar is missing, compressed or, without `skip_damaged`, damaged.
    """
    digest = hashlib.sha256() if checksums else None
    try:
        file = RangedFile(store, name, digest)
        if file.read_at(0, 8).startswith(COMPRESSED):
            raise UserError(compressed_message(store, name))
        scan = _scan(file, SkippedSamples(skip_damaged))
        if digest is not None:
            file.read_at(file.size - 1, 1)  # the digest covers the whole file, also after a damaged header
            scan.sha256 = digest.hexdigest()
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)} was removed after the folder was listed") from None
    return scan


def compressed_message(store: Store, name: str) -> str:
    """The error for a compressed tar."""
    return (
        f"{store.describe(name)} is compressed, so single images cannot be read: decompress it to a plain .tar (the "
        "images in it are compressed already)"
    )


def _scan(file: RangedFile, skipped: SkippedSamples) -> ScannedShard:
    scan = ScannedShard(file.name, file.size, skipped)
    begins: dict[str, int] = {}  # key → byte of its first header
    rows: list[dict[str, Any]] = []
    sample: _Sample | None = None

    def finish(sample: _Sample) -> None:
        first = begins.setdefault(sample.key, sample.begin)
        if first != sample.begin:
            sample.problem = (
                f"duplicate key, it is also at byte {first} (the files of a sample must be adjacent: create the tar with "
                "--sort=name)"
            )
        label = _label(sample)
        if sample.unreadable and (sample.image is None or _is_better(sample.unreadable[0], sample.image)):
            sample.problem = sample.problem or sample.unreadable[1]
        if sample.problem:
            skipped.add(f"{describe_sample(file.name, sample.key, sample.begin)}: {sample.problem}")
        elif sample.image is None:
            scan.without_image += 1
        else:
            rows.append({"key": sample.key, **sample.row, "label": label})
            _add_kind(scan, sample)

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
            _add_file(file, sample, member, extension)
        if sample is not None:
            finish(sample)
    except TarDamageError as damage:
        # The last sample is skipped as well: more of its files may follow.
        at = (
            f"in or after {printable(sample.key)} at byte {sample.begin}" if sample else "at its first header"
        )
        skipped.add(f"{file.name}: {damage}, {at}; the rest of the tar cannot be read")
    scan.rows = pa.Table.from_pylist(rows, schema=ROWS_SCHEMA)
    return scan


def describe_sample(shard: str, key: str, byte: int) -> str:
    """Name a sample in a message: "x.tar: cat/1 at byte 1024"."""
    return f"{shard}: {printable(key)} at byte {byte}"


def printable(text: str) -> str:
    """The text, or its ASCII escapes if it has characters that are not printable."""
    return text if text.isprintable() else ascii(text)


def split_name(name: str) -> tuple[str, str]:
    """Split a path into key and extension. The key is "" for files that WebDataset skips."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or re.match(r"__[^/]*__($|/)", name):
        return "", ""
    return folder + slash + stem, extension.lower()


def _add_file(file: RangedFile, sample: _Sample, member: tarfile.TarInfo, extension: str) -> None:
    """Add a file to its sample."""
    sample.problem = sample.problem or _header_problem(member)
    if extension in sample.extensions:
        sample.problem = sample.problem or f"the sample has two .{extension} files"
    sample.extensions.add(extension)
    if not member.isreg() or member.issparse():
        return
    if member.offset_data + member.size > file.size:
        what = f"the tar is cut off at byte {file.size}, inside {printable(member.name)}"
        raise TarDamageError(what)
    if extension in ("cls", "json"):
        if member.size > MAX_LABEL_FILE:
            sample.problem = (
                sample.problem
                or f"its .{extension} file is too large ({member.size} bytes, at most {MAX_LABEL_FILE})"
            )
        elif extension == "cls":
            sample.cls = file.read_at(member.offset_data, member.size).decode("utf-8", "replace").strip()
        else:
            sample.json = file.read_at(member.offset_data, member.size)
    elif extension in IMAGE_TYPES and not sample.problem:
        try:
            row, info = _read_image(file, member)
        except ValueError as error:
            if sample.unreadable is None or _is_better(extension, sample.unreadable[0]):
                sample.unreadable = extension, f"{printable(member.name)}: {error}"
        else:
            if sample.image is None or _is_better(extension, sample.image):
                sample.image, sample.row, sample.info = extension, row, info


def _is_better(extension: str, other: str) -> bool:
    return IMAGE_TYPES.index(extension) < IMAGE_TYPES.index(other)


def _add_kind(scan: ScannedShard, sample: _Sample) -> None:
    """Record the type of a sample's image."""
    info = sample.info
    assert info is not None
    says_bits = info.dtype == "uint16" and info.bits < 16
    name = describe_sample(scan.name, sample.key, sample.begin)
    scan.kinds.add(name, info.channels, info.dtype, info.bits if says_bits else 0)
    if info.dtype == "uint16" and not says_bits and len(scan.deep) < MAX_DEEP:
        scan.deep.append((sample.row["offset"], sample.row["size"]))


def image_kinds(store: Store, scans: list[ScannedShard], bits: int | None = None) -> ImageKinds:
    """The types of all images.

    Args:
        store: of the tars.
        bits: significant bits of 16-bit images, if the user said. Otherwise up to MAX_DEEP images whose files do not say are
            decoded, spread over all tars.
    """
    kinds = ImageKinds()
    for scan in scans:
        kinds.merge(scan.kinds)
    places = [(scan.name, *place) for scan in scans for place in scan.deep]
    if not places:
        return kinds
    if bits:
        return kinds.model_copy(update={"bits": bits})
    chosen = places[:: -(-len(places) // MAX_DEEP)]
    used = max(map_ahead(lambda place: _used_bits(store, *place), chosen, THREADS))
    kinds.merge(ImageKinds(bits=used, found=True))
    return kinds


def _used_bits(store: Store, name: str, offset: int, size: int) -> int:
    """The bits that the values of a 16-bit image use; 0 if it is damaged."""
    data = store.read_range(name, offset, size)
    try:
        pixels = read_pixels(data)
        return significant_bits(data, pixels, 0) or bits_of(int(pixels.max()))
    except Exception:  # training counts it as a bad sample, and verify names it
        return 0


def _header_problem(member: tarfile.TarInfo) -> str | None:
    """What is wrong with a file, judged by its header, or None."""
    name = printable(member.name)
    if not member.name.isprintable():
        return "a file name is not printable UTF-8"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"the path {name} is absolute or contains .."
    if member.issym() or member.islnk():
        return f"{name} is a link to {printable(member.linkname)} (create the tar with --dereference --hard-dereference)"
    if member.issparse():
        return f"{name} is a sparse file (create the tar without --sparse)"
    if not member.isreg():
        return f"{name} is not a regular file"
    return None


def _read_image(file: RangedFile, member: tarfile.TarInfo) -> tuple[dict[str, int], ImageInfo]:
    """Return the image's index columns and its header. ValueError, with the reason, if the image is damaged."""
    offset, size = member.offset_data, member.size
    if size == 0:
        raise ValueError("the file is empty")
    if size >= 2**31:
        raise ValueError("the file is 2 GiB or larger")
    crc = 0
    if file.digest is None:
        info = image_info(lambda at, n: file.read_at(offset + at, n), size)
    else:
        data = file.read_at(offset, size)
        crc = crc32c(data)
        info = image_info(lambda at, n: data[at : at + n], size)
    row = {"offset": offset, "size": size, "width": info.width, "height": info.height, "crc32c": crc}
    return row, info


def _label(sample: _Sample) -> str:
    """Return the label as text (see `label_value`), "" for none. Sets the sample's problem if the label cannot be read."""
    try:
        if sample.cls is not None:
            if not sample.cls:
                raise ValueError("it is empty")
            return label_value(sample.cls, chosen=True)
    except ValueError as error:
        sample.problem = sample.problem or f"its .cls file cannot be a label: {error}"
        return ""
    if sample.json is None:
        return ""
    try:
        tree = json.loads(sample.json)
    except (ValueError, RecursionError):
        sample.problem = sample.problem or "its .json file is not valid JSON"
        return ""
    return _json_label(tree)


def _json_label(tree: Any) -> str:
    """The first of JSON_FIELDS that is a label, or ""."""
    for name in JSON_FIELDS if isinstance(tree, dict) else ():
        with contextlib.suppress(ValueError):
            if text := label_value(tree.get(name)):
                return text
    return ""
