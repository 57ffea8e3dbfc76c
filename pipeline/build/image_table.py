"""The table of images that shards are built from: one row per image.

A row says where the image's bytes are: a file, or a byte range of a file. So the images can be put in any order, and read
by many processes, each of which gets only its own rows.
"""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.build import imagenet
from pipeline.build.synthetic import draw_scene
from pipeline.dataset.manifest import NO_LABEL
from pipeline.errors import UserError
from pipeline.parallel import THREADS, map_ahead
from pipeline.storage.store import open_store

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")
T = TypeVar("T")
WHOLE_FILE = -1  # as offset: the image is the whole file
ITEMS = pa.schema(
    [
        ("key", pa.string()),  # the WebDataset key: no dot after the last slash
        ("label", pa.int32()),  # NO_LABEL if the source has none
        ("file", pa.string()),  # name of the file with its bytes, in the source's store
        ("offset", pa.int64()),  # of its first byte; WHOLE_FILE if the file is the image
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
        """Name the image in a message."""
        if self.offset == WHOLE_FILE:
            return self.file
        return f"{self.key} at byte {self.offset} of {self.file}" if self.file else self.key


@dataclass(frozen=True)
class RangeReader:
    """Reads images that are files, or byte ranges of files, below a URL."""

    url: str

    @property
    def identity(self) -> str:
        """Text for the digest of a plan (see `pipeline.build.build`): a change of it makes builds start over."""
        return f"Ranges(url={self.url!r})"

    @property
    def is_remote(self) -> bool:
        """Whether a read mostly waits for the network."""
        return not open_store(self.url, already_reached=True).is_local

    def open(self) -> Callable[[Item], bytes]:
        """Return a function that reads the bytes of an image."""
        store = open_store(self.url, already_reached=True)

        def read(item: Item) -> bytes:
            try:
                if item.offset == WHOLE_FILE:
                    return store.read(item.file)
                return store.read_range(item.file, item.offset, item.size)
            except FileNotFoundError:
                raise UserError(
                    f"{store.describe(item.file)} was removed after it was listed, or does not exist on {platform.node()}: "
                    "files that several machines read must be on a shared file system or in a bucket"
                ) from None

        return read


@dataclass(frozen=True)
class SceneRenderer:
    """Draws synthetic images: the item's offset is the number of the image."""

    seed: int
    is_remote = False

    @property
    def identity(self) -> str:
        """See `RangeReader.identity`."""
        return f"Scenes(seed={self.seed})"

    def open(self) -> Callable[[Item], bytes]:
        """Return a function that draws an image."""
        return lambda item: draw_scene(self.seed, item.offset, item.label)


ImageReader = RangeReader | SceneRenderer  # goes to other processes


@dataclass(frozen=True)
class Source:
    """All images of a source, and the reader of their bytes."""

    description: str  # for messages and the manifest
    items: pa.Table  # ITEMS
    classes: list[str]  # empty for a source without labels
    reader: ImageReader
    warnings: tuple[str, ...] = ()  # what is unusual, one line each


def make_source(description: str, classes: list[str], reader: ImageReader, items: pa.Table) -> Source:
    """Return the source of these images (ITEMS). UserError if two images have the same key."""
    keys = items["key"]
    if pc.count_distinct(keys).as_py() != len(items):
        counts = pc.value_counts(keys)
        key = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        same_key = items.filter(pc.equal(keys, key)).slice(0, 2).to_pylist()
        first, second = (Item(**row).describe() for row in same_key)
        raise UserError(
            f"{description}: {first} and {second} would both get the key {key}: rename one of them"
        )
    counts = np.bincount(items["label"].to_numpy() - NO_LABEL, minlength=len(classes) + 1)[1:]
    return Source(
        description, items.combine_chunks(), classes, reader, imagenet.find_oddities(classes, counts.tolist())
    )


def key_of(name: str) -> str:
    """Return the WebDataset key of a file: its path without the extension.

    A WebDataset key ends at the first dot of the file name, so other dots become underscores.
    """
    path = PurePosixPath(name)
    return str(path.with_name(path.stem.replace(".", "_")))


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS


def map_items(
    function: Callable[[Item], T], items: list[Item], reader: ImageReader, memory: int
) -> Iterator[T]:
    """Map a function that reads images over items, in order, and in threads if the reader is remote.

    `memory`: at most this many bytes of images are read ahead.
    """
    # Threads pay off only for reads that wait: handing images from thread to thread costs a third of a core.
    if not reader.is_remote:
        return map(function, items)
    return map_ahead(function, items, THREADS, lambda item: item.size, memory)


def rows_of(items: pa.Table) -> list[Item]:
    """The rows of a table (ITEMS) as a list."""
    return list(map(Item._make, zip(*(column.to_pylist() for column in items.columns), strict=True)))
