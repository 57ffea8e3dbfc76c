"""Scan a WebDataset tar: find its samples and labels, and report damage.

WebDataset's rules: a sample is a group of adjacent files with the same key. The key is the file's path up to the first
dot of the file name; the rest, in lower case, is the extension. So `cat/1.jpg` and `cat/1.cls` are the sample `cat/1`.
`--split-at last-dot` is for names with dots: then `22.05.png` and `22.06.png` are two samples.

Hidden files and folders, and `__MACOSX`, which macOS's tar and zip add, belong to no sample. Which file is a sample's image,
and what its label is, is in `pipeline.dataset.tar_sample`.
"""

import hashlib
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from crc32c import crc32c

from pipeline.dataset.fields import Fields, kept_kind, kept_text
from pipeline.dataset.manifest import INDEX_SCHEMA
from pipeline.dataset.scan_notes import ScanNotes
from pipeline.dataset.tar_sample import Candidate, TarSample, is_candidate, is_read
from pipeline.errors import UserError
from pipeline.images.convert import significant_bits
from pipeline.images.formats import ImageInfo, image_info, read_pixels
from pipeline.images.kinds import ImageKinds, bits_of
from pipeline.parallel import THREADS, map_ahead
from pipeline.storage.ranged_file import RangedFile
from pipeline.storage.store import Store
from pipeline.storage.tar_reader import COMPRESSED, TarDamageError, tar_members

NO_FIELDS = Fields()
MAX_DEEP = 64  # 16-bit images whose values are looked at to find how many bits they use
MAX_LABEL_FILE = 1 << 20  # largest .cls or .json file in bytes
MAX_LISTED = 20  # skipped samples that are listed by name


@dataclass(frozen=True)
class ScanOptions:
    """How tars are scanned."""

    checksums: bool = False  # whether to read all bytes; otherwise only headers are read
    skip_damaged: bool = False  # whether to skip damaged samples; otherwise the first one is an error
    fields: Fields = NO_FIELDS


@dataclass
class SkippedSamples:
    """Damaged samples. Unless they may be skipped, the first one is an error."""

    allowed: bool
    count: int = 0
    limit: int = MAX_LISTED
    listed: list[str] = field(default_factory=list)  # the first `limit`, one line each

    def add(self, line: str, cure: str = "Repair the file") -> None:
        """Count a damaged sample; `line` describes it. UserError if samples may not be skipped."""
        if not self.allowed:
            raise UserError(f"{line}. {cure}, or pass --skip-damaged to skip damaged samples")
        self.count += 1
        self.listed = [*self.listed, line][: self.limit]

    def merge(self, other: "SkippedSamples") -> None:
        self.count += other.count
        self.listed = (self.listed + other.listed)[: self.limit]


@dataclass
class ScannedShard:
    """The samples of one tar."""

    name: str
    bytes: int
    skipped: SkippedSamples
    rows: pa.Table = None  # `rows_schema`, in the tar's order
    sha256: str = ""  # of the tar; "" if its bytes were not read
    without_image: int = 0  # number of samples without an image; they are not in `rows`
    other_files: int = 0  # number of files that belong to no sample, such as ._name
    notes: ScanNotes = field(default_factory=ScanNotes)
    kinds: ImageKinds = field(default_factory=ImageKinds)  # types of its images
    # (offset, size in bytes) of some 16-bit images whose files do not say how many bits are used.
    deep: list[tuple[int, int]] = field(default_factory=list)


def rows_schema(fields: Fields) -> pa.Schema:
    """INDEX_SCHEMA with labels as text (see `label_value`), and kept values as JSON text, "" for none."""
    columns = [pa.field("label", pa.string()) if f.name == "label" else f for f in INDEX_SCHEMA]
    return pa.schema([*columns, *((name, pa.string()) for name in fields.columns)])


def scan_shard(store: Store, name: str, options: ScanOptions) -> ScannedShard:
    """Find the samples of a tar. Reads its headers, or with checksums all of its bytes.

    UserError if the tar is missing, if it is unclear which image of a sample is meant, or if the tar is damaged or compressed
    and that may not be skipped.
    """
    digest = hashlib.sha256() if options.checksums else None
    skipped = SkippedSamples(options.skip_damaged)
    try:
        file = RangedFile(store, name, digest)
        if file.read_at(0, 8).startswith(COMPRESSED):
            skipped.add(compressed_message(store, name), "Decompress it")
            return ScannedShard(name, file.size, skipped, rows_schema(options.fields).empty_table())
        scan = _Scan(file, skipped, options.fields).run()
        if digest is not None:
            if file.size:
                file.read_at(
                    file.size - 1, 1
                )  # the digest covers the whole file, also after a damaged header
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


class _Scan:
    """Scans one tar."""

    def __init__(self, file: RangedFile, skipped: SkippedSamples, fields: Fields) -> None:
        self.file, self.fields = file, fields
        self.scan = ScannedShard(file.name, file.size, skipped)
        self.scan.notes.kept = {name: Counter() for name in fields.columns}
        self.begins: dict[str, int] = {}  # key → byte of its first header
        self.rows: list[dict[str, Any]] = []

    def run(self) -> ScannedShard:
        sample: TarSample | None = None
        scan = self.scan
        try:
            for member in tar_members(self.file):
                if member.isdir():
                    continue
                key, extension = split_name(member.name, self.fields.split_at)
                if not key:
                    scan.other_files += 1
                    continue
                if sample is None or sample.key != key:
                    if sample is not None:
                        self._finish(sample)
                    sample = TarSample(key, member.offset)
                _add_file(self.file, sample, member, extension, self.fields)
            if sample is not None:
                self._finish(sample)
        except TarDamageError as damage:
            # The last sample is skipped as well: more of its files may follow.
            at = (
                f"in or after {printable(sample.key)} at byte {sample.begin}"
                if sample
                else "at its first header"
            )
            scan.skipped.add(f"{scan.name}: {damage}, {at}; the rest of the tar cannot be read")
        scan.rows = pa.Table.from_pylist(self.rows, schema=rows_schema(self.fields))
        if not self.rows and not scan.skipped.count:
            scan.notes.empty, scan.notes.empty_count = [scan.name], 1
        return scan

    def _finish(self, sample: TarSample) -> None:
        """Add a sample whose files are read to the rows, or count why it is none."""
        scan, place = self.scan, describe_sample(self.file.name, sample.key, sample.begin)
        first = self.begins.setdefault(sample.key, sample.begin)
        if first != sample.begin:
            sample.problem = (
                f"duplicate key, it is also at byte {first} (the files of a sample must be adjacent: create the tar with "
                "--sort=name)"
            )
        image = None if sample.problem else sample.image(self.fields, place)
        label, reason, kept = "", None, dict[str, Any]()
        try:
            label, reason = sample.label(self.fields)
            kept = sample.kept(self.fields)
        except ValueError as error:
            sample.problem = sample.problem or str(error)
        if sample.problem:
            scan.skipped.add(f"{place}: {sample.problem}")
        elif image is None:
            scan.without_image += 1
        else:
            self.rows.append(
                {"key": sample.key, **image.row, "label": label, **{n: kept_text(v) for n, v in kept.items()}}
            )
            assert image.info is not None
            _add_kind(scan, place, image.row, image.info)
            scan.notes.add_image(image, sample.candidates, place)
            scan.notes.check_prefixes(scan.name, self.fields)
            scan.notes.labelled += label != ""
            if reason:
                scan.notes.add_no_label(reason, place)
            for name, value in kept.items():
                if kind := kept_kind(value):
                    scan.notes.kept[name][kind] += 1


def describe_sample(shard: str, key: str, byte: int) -> str:
    """Name a sample in a message: "x.tar: cat/1 at byte 1024"."""
    return f"{shard}: {printable(key)} at byte {byte}"


def printable(text: str) -> str:
    """The text, or its ASCII escapes if it has characters that are not printable."""
    return text if text.isprintable() else ascii(text)


def split_name(name: str, split_at: str = "first-dot") -> tuple[str, str]:
    """Split a path into key and extension. The key is "" for files that belong to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.rpartition(".") if split_at == "last-dot" else base.partition(".")
    if base.startswith(".") or not dot or re.match(r"__[^/]*__($|/)", name):
        return "", ""
    if is_hidden(folder):
        return "", ""
    return folder + slash + stem, extension.lower()


def is_hidden(path: str) -> bool:
    """Whether a file or folder is hidden, or macOS's: `.name`, or in a folder `.name` or `__MACOSX`."""
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in path.split("/")
    )


def _add_file(
    file: RangedFile, sample: TarSample, member: tarfile.TarInfo, extension: str, fields: Fields
) -> None:
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
    if is_read(extension, fields):
        if member.size > MAX_LABEL_FILE:
            sample.problem = (
                sample.problem
                or f"its .{extension} file is too large ({member.size} bytes, at most {MAX_LABEL_FILE})"
            )
        else:
            sample.texts[extension] = file.read_at(member.offset_data, member.size)
    elif is_candidate(extension, fields) and not sample.problem:
        try:
            candidate = Candidate(extension, *_read_image(file, member))
        except ValueError as error:
            candidate = Candidate(extension, {}, None, f"{printable(member.name)}: {error}")
        sample.candidates.append(candidate)


def _add_kind(scan: ScannedShard, place: str, row: dict[str, Any], info: ImageInfo) -> None:
    """Record the type of a sample's image. `place` describes the sample."""
    says_bits = info.dtype == "uint16" and info.bits < 16
    scan.kinds.add(place, info.channels, info.dtype, info.bits if says_bits else 0)
    if info.dtype == "uint16" and not says_bits and len(scan.deep) < MAX_DEEP:
        scan.deep.append((row["offset"], row["size"]))


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
