"""What the names of files and folders say: which are images, which are hidden, which are splits of a dataset."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from pipeline.images.formats import EXTENSIONS
from pipeline.text import plural

IMAGE_EXTENSIONS = tuple(f".{extension}" for extension in EXTENSIONS)
# What systems and programs put into folders, in lower case. Names that start with a dot are hidden as well.
SYSTEM_NAMES = {
    "#recycle",
    "$recycle.bin",
    "@eadir",  # Synology
    "__macosx",  # zip files made on a Mac
    "desktop.ini",
    "ehthumbs.db",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
_SPLIT = re.compile(
    r"(?:(train|training)|(val|valid|validation|dev)|(test|testing|eval|evaluation))(?:[-_ ]?(?:set|split|data|images|\d+))?",
    re.IGNORECASE,
)
_KINDS_NAMED = 8  # extensions that a message names


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder of its path, is hidden or made by the system, such as .ipynb_checkpoints or Thumbs.db."""
    return any(part.startswith(".") or part.lower() in SYSTEM_NAMES for part in name.split("/"))


def has_image_extension(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS


def is_image(name: str) -> bool:
    """Whether a path has the extension of an image, and nothing in it is hidden."""
    return has_image_extension(name) and not is_hidden(name)


def key_of(name: str) -> str:
    """Return the WebDataset key of a file: its path without the extension.

    A WebDataset key ends at the first dot of the file name, so other dots become underscores.
    """
    path = PurePosixPath(name)
    return str(path.with_name(path.stem.replace(".", "_")))


def split_of(name: str) -> str | None:
    """The split that a folder's name stands for, "train", "val" or "test". None for all other names."""
    found = _SPLIT.fullmatch(name)
    if found is None:
        return None
    return next(split for split, text in zip(("train", "val", "test"), found.groups(), strict=True) if text)


def file_split(name: str) -> tuple[str, str]:
    """The split of a file of many images by its name or its folders, "" for none, and a pattern for all files of the split.

    "data/train-00000-of-00002.parquet" → ("train", "data/train-*"); "default/test/0000.parquet" → ("test", "default/test/*").
    """
    *folders, base = name.split("/")
    for place, folder in enumerate(folders):
        if split := split_of(folder):
            return split, "/".join([*folders[: place + 1], "*"])
    start, separator, _ = base.partition("-")
    if not (separator and "-of-" in base):
        start = re.split(r"[-_.]", base)[0]
        split = split_of(start) or ""
    else:
        split = split_of(start) or start
    return split, "/".join([*folders, f"{start}{base[len(start) : len(start) + 1]}*"])


def count_by_extension(names: Iterable[str]) -> str:
    """Count files by extension, the most frequent first: "10 .txt, 2 .heic"."""
    counts = Counter(PurePosixPath(name).suffix.lower() or "without an extension" for name in names)
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    named = [f"{count:,} {extension}" for extension, count in ordered[:_KINDS_NAMED]]
    return ", ".join(named) + (", …" if len(ordered) > _KINDS_NAMED else "")


def ignored_notes(names: Iterable[str]) -> list[str]:
    """Lines about the files of a folder that are not taken as images. Hidden files count only if they look like images."""
    others, hidden = [], []
    for name in names:
        if not is_hidden(name):
            if not has_image_extension(name):
                others.append(name)
        elif has_image_extension(name):
            hidden.append(name)
    notes = []
    if others:
        notes.append(f"ignored {plural(len(others), 'other file')}: {count_by_extension(others)}")
    if hidden:
        notes.append(f"ignored {plural(len(hidden), 'hidden image')}, such as {hidden[0]}")
    return notes
