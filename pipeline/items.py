"""What shards are built from: a table of images, a row an image.

A row says where an image's bytes lie: a whole file, or a range of bytes of one. So images can be put in any order and
read by many processes, each of which is given nothing but its rows.
"""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import imagenet
from pipeline.ahead import THREADS, map_ahead
from pipeline.errors import UserError
from pipeline.manifest import NO_LABEL
from pipeline.scenes import draw_scene
from pipeline.storage import open_store

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")
T = TypeVar("T")
WHOLE = -1  # as offset: the image is the whole file
ITEMS = pa.schema(
    [
        ("key", pa.string()),  # its WebDataset key: no dot after the last slash
        ("label", pa.int32()),  # NO_LABEL where the source has none
        ("file", pa.string()),  # where its bytes lie
        ("offset", pa.int64()),
        ("size", pa.int64()),  # bytes
    ]
)


class Item(NamedTuple):
    """A row of ITEMS."""

    key: str
    label: int
    file: str
    offset: int
    size: int

    def describe(self) -> str:
        if self.offset == WHOLE:
            return self.file
        return f"{self.key} at byte {self.offset} of {self.file}" if self.file else self.key


@dataclass(frozen=True)
class Ranges:
    """Reads items that are files, or parts of files, below a URL."""

    url: str

    @property
    def waits(self) -> bool:
        """Whether bytes take much longer to come than to read."""
        return not open_store(self.url, known=True).is_local

    def open(self) -> Callable[[Item], bytes]:
        store = open_store(self.url, known=True)

        def read(item: Item) -> bytes:
            try:
                if item.offset == WHOLE:
                    return store.read(item.file)
                return store.read_range(item.file, item.offset, item.size)
            except FileNotFoundError:
                raise UserError(
                    f"{store.describe(item.file)} has gone since it was listed, or is not there on {platform.node()}: what "
                    "many machines read has to be on a file system that they share, or in a bucket"
                ) from None

        return read


@dataclass(frozen=True)
class Scenes:
    """Draws items."""

    seed: int
    waits = False

    def open(self) -> Callable[[Item], bytes]:
        return lambda item: draw_scene(self.seed, item.offset, item.label)


@dataclass(frozen=True)
class Source:
    """All images of a source, and how the bytes of one are had. `reader` goes to other processes."""

    description: str
    items: pa.Table  # ITEMS
    classes: list[str]  # empty for a source without labels
    reader: Ranges | Scenes
    warnings: tuple[str, ...] = ()  # what is unusual, a line each


def make_source(description: str, classes: list[str], reader: Ranges | Scenes, items: pa.Table) -> Source:
    """UserError where a key is there twice."""
    keys = items["key"]
    if pc.count_distinct(keys).as_py() != len(items):
        counts = pc.value_counts(keys)
        key = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        twice = items.filter(pc.equal(keys, key)).slice(0, 2).to_pylist()
        first, second = (Item(**row).describe() for row in twice)
        raise UserError(f"{description}: {first} and {second} would both get the key {key}: rename one")
    counts = np.bincount(items["label"].to_numpy() - NO_LABEL, minlength=len(classes) + 1)[1:]
    return Source(
        description, items.combine_chunks(), classes, reader, imagenet.remarks(classes, counts.tolist())
    )


def key_of(name: str) -> str:
    """The file's path without its extension. WebDataset ends a key at the first dot of the file name, so
    other dots become underscores."""
    path = PurePosixPath(name)
    return str(path.with_name(path.stem.replace(".", "_")))


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS


def map_items(
    function: Callable[[Item], T], items: list[Item], reader: Ranges | Scenes, memory: int
) -> Iterator[T]:
    """`map` over items whose bytes the function has read, in order, with no more than `memory` bytes of them ahead."""
    # Threads are for what a store makes one wait for. To hand images from one to another costs a third of a core.
    if not reader.waits:
        return map(function, items)
    return map_ahead(function, items, THREADS, lambda item: item.size, memory)


def rows_of(items: pa.Table) -> list[Item]:
    return list(map(Item._make, zip(*(column.to_pylist() for column in items.columns), strict=True)))
