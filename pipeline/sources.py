"""Where images come from when shards are built: folders, and drawn scenes.

A source is a list of items, each of which can be loaded on its own, so that they can be put in any order
and read in parallel.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, urlsplit

from pipeline.errors import UserError
from pipeline.manifest import NO_LABEL
from pipeline.scenes import SHAPES, draw_scene
from pipeline.storage import Store, open_store

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Item:
    """One image of a source."""

    key: str  # its WebDataset key: no dot after the last slash
    label: int  # NO_LABEL where the source has none
    name: str  # what to call it in a message
    load: Callable[[], bytes]


@dataclass(frozen=True)
class Source:
    items: list[Item]
    classes: list[str]  # empty for a source without labels
    description: str
    store: Store | None = None  # where it lies, so that nothing is built into it


def open_source(source: str) -> Source:
    """`synthetic:?count=4096&classes=10&seed=0`, or a folder (path or URL) of class folders or of images."""
    return _synthetic(source) if source.startswith("synthetic:") else _folder(source)


def _folder(url: str) -> Source:
    """Class folders: the class of an image is the first folder of its path, the labels are the sorted names
    (as torchvision's ImageFolder). Images lying flat have no labels."""
    store = open_store(url)
    names = store.names()
    if not names and not store.exists(""):
        raise UserError(f"{store.url}: no such folder")
    for name in names:
        if not name.isprintable() or any("\ud800" <= c <= "\udfff" for c in name):
            raise UserError(f"{store.url}: the file name {name!a} is not printable UTF-8: rename it")
    images = [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS]
    if not images:
        raise UserError(f"{store.url} has no images in it (looked for {', '.join(IMAGE_EXTENSIONS)})")
    in_folders = [name for name in images if "/" in name]
    if in_folders and len(in_folders) != len(images):
        flat = next(name for name in images if "/" not in name)
        raise UserError(
            f"{store.url} has images both in class folders ({in_folders[0]}) and beside them ({flat}): "
            "move the latter away, or into a folder"
        )
    classes = sorted({name.split("/", 1)[0] for name in in_folders})
    label_of = {name: label for label, name in enumerate(classes)}
    keys: dict[str, str] = {}
    items = []
    for name in images:
        key = _key(name)
        if key in keys:
            raise UserError(f"{store.url}: {keys[key]} and {name} would both get the key {key}: rename one")
        keys[key] = name
        label = label_of[name.split("/", 1)[0]] if classes else NO_LABEL
        items.append(Item(key, label, name, functools.partial(store.read, name)))
    return Source(items, classes, store.url, store)


def _key(name: str) -> str:
    """The file's path without its extension. WebDataset ends a key at the first dot of the file name, so
    other dots become underscores."""
    path = PurePosixPath(name)
    return str(path.with_name(path.stem.replace(".", "_")))


def _synthetic(url: str) -> Source:
    options = {"count": 4096, "classes": len(SHAPES), "seed": 0}
    for name, value in parse_qsl(urlsplit(url).query, keep_blank_values=True):
        if name not in options:
            raise UserError(f"{url}: unknown option {name}, known are {', '.join(options)}")
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"{url}: {name} must be a whole number, not {value!r}")
        options[name] = int(value)
    count, classes, seed = options.values()
    if count < 1 or not 1 <= classes <= len(SHAPES):
        raise UserError(f"{url}: count must be 1 or more, classes 1 to {len(SHAPES)}")
    names = list(SHAPES)[:classes]
    items = [
        Item(
            f"{names[i % classes]}/{i:08d}",
            i % classes,
            f"scene {i}",
            functools.partial(draw_scene, seed, i, i % classes),
        )
        for i in range(count)
    ]
    return Source(items, names, f"synthetic:?count={count}&classes={classes}&seed={seed}")
