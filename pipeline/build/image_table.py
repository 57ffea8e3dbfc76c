"""The table of images that shards are built from: one row per image.

A row says where the image's bytes are: a file, or a byte range of a file. So the images can be put in any order, and read
by many processes, each of which gets only its own rows.

The table has the columns of ITEMS. If labels are not one class for each image, `label` is a list (see `label_type`). Values
that --keep-json keeps are further columns.
"""

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import Ints
from pipeline.build import imagenet
from pipeline.build.synthetic import draw_scene
from pipeline.dataset.fields import Fields, kept_array, kept_kind, kept_text, kept_type
from pipeline.dataset.manifest import NO_LABEL, LabelKind, label_type
from pipeline.errors import UserError
from pipeline.parallel import THREADS, map_ahead
from pipeline.storage.mounts import open_tars
from pipeline.text import plural

T = TypeVar("T")
NO_FIELDS = Fields()
Label = int | list[int] | list[float] | None
WHOLE_FILE = -1  # as offset: the image is the whole file
ITEMS = pa.schema(
    [
        ("key", pa.string()),  # the WebDataset key: no dot after the last slash
        ("label", pa.int32()),  # NO_LABEL if the source has none; or a list, then null for none
        ("file", pa.string()),  # name of the file with its bytes, in the source's store
        ("offset", pa.int64()),  # of its first byte; WHOLE_FILE if the file is the image
        ("size", pa.int64()),  # bytes
    ]
)


class Item(NamedTuple):
    """A row of ITEMS."""

    key: str
    label: Label
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
        return not open_tars(self.url, already_reached=True).is_local

    def open(self) -> Callable[[Item], bytes]:
        """Return a function that reads the bytes of an image."""
        store = open_tars(self.url, already_reached=True)

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
        return lambda item: draw_scene(self.seed, item.offset, int(item.label))  # type: ignore[arg-type]  # scenes have one class each


ImageReader = RangeReader | SceneRenderer  # goes to other processes


@dataclass(frozen=True)
class SourceOptions:
    """How a source is understood. A build's bytes depend on all of them."""

    # What folders or files such as train and val are: classes, or parts of one dataset. None: they are refused.
    splits: Literal["classes", "merge"] | None = None
    allow_empty_classes: bool = False  # whether class folders without images are classes
    fields: Fields = NO_FIELDS

    def changes(self) -> dict[str, Any]:
        """Those that differ from their defaults, as in building.json."""
        tree = asdict(self)
        return {
            field.name: tree[field.name]
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


@dataclass(frozen=True)
class Source:
    """All images of a source, and the reader of their bytes."""

    description: str  # for messages and the manifest
    items: pa.Table  # ITEMS
    classes: list[str]  # empty for a source without labels
    reader: ImageReader
    notes: tuple[str, ...] = ()  # facts about the source that users may not expect, one line each
    left_out: tuple[
        str, ...
    ] = ()  # "name: reason" of each image that is not in `items`, because it cannot be read

    @property
    def kind(self) -> LabelKind:
        """What the labels mean."""
        kinds: tuple[LabelKind, ...] = get_args(LabelKind)
        return next(kind for kind in kinds if label_type(kind) == self.items.schema.field("label").type)

    def images_per_class(self) -> Ints:
        """int64[classes]; zeros if labels are no classes."""
        return images_per_class(self.items["label"], len(self.classes))


def images_per_class(labels: pa.ChunkedArray, classes: int) -> Ints:
    """Count the images of each class → int64[classes], zeros if labels are numbers to predict. `labels`: as in ITEMS."""
    if labels.type == label_type("numbers"):
        return np.zeros(classes, np.int64)
    if labels.type == label_type("classes"):
        return np.bincount(pc.list_flatten(labels).to_numpy(), minlength=classes)
    return np.bincount(labels.to_numpy() - NO_LABEL, minlength=classes + 1)[1:]


def with_labels(items: pa.Table, labels: pa.Array) -> pa.Table:
    """The same table with other labels. `labels`: `label_type` of their kind."""
    return items.set_column(ITEMS.get_field_index("label"), pa.field("label", labels.type), labels)


def make_source(
    description: str,
    classes: list[str],
    reader: ImageReader,
    items: pa.Table,
    notes: Iterable[str] = (),
    left_out: Iterable[str] = (),
) -> Source:
    """Return the source of these images. Images with the key of an earlier one get a key of their own.

    Args:
        description, classes, reader, items, notes, left_out: see `Source`. Further notes are added.
    """
    items, key_notes = _with_distinct_keys(items.combine_chunks())
    source = Source(description, items, classes, reader, left_out=tuple(left_out))
    oddities = (
        imagenet.find_oddities(classes, source.images_per_class().tolist()) if source.kind == "class" else ()
    )
    return replace(source, notes=(*notes, *key_notes, *oddities, *_unlabelled_note(items)))


def _unlabelled_note(items: pa.Table) -> list[str]:
    """How many images have no label, if others have one."""
    labels = items["label"]
    is_list = pa.types.is_list(labels.type)
    missing = pc.is_null(labels) if is_list else pc.or_kleene(pc.is_null(labels), pc.equal(labels, NO_LABEL))
    missing = pc.fill_null(missing, True)
    count = pc.sum(missing).as_py() or 0
    if not 0 < count < len(labels):
        return []
    first = items["key"][pc.index(missing, True).as_py()].as_py()
    return [f"{plural(count, 'image')} without a label, such as {first}"]


def _with_distinct_keys(items: pa.Table) -> tuple[pa.Table, list[str]]:
    """Number the images whose key an earlier one has: "cat", "cat_2", "cat_3". Returns also a note, if there are any."""
    if pc.count_distinct(items["key"]).as_py() == len(items):
        return items, []
    keys = items["key"].to_pylist()
    taken, last = set(keys), dict.fromkeys(keys, 0)  # all keys; the last number that was given for each
    renamed: list[int] = []
    for place, key in enumerate(keys):
        last[key] += 1
        if last[key] == 1:
            continue
        while (numbered := f"{key}_{last[key]}") in taken:
            last[key] += 1
        taken.add(numbered)
        keys[place] = numbered
        renamed.append(place)
    example = rows_of(items.slice(renamed[0], 1))[0].describe()
    note = (
        f"{plural(len(renamed), 'image')} got a number at the end of the key, because another image has the same: "
        f"{example} has the key {keys[renamed[0]]}"
    )
    return items.set_column(0, ITEMS.field("key"), pa.array(keys, pa.string())), [note]


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
    columns = (items[name].to_pylist() for name in ITEMS.names)
    return list(map(Item._make, zip(*columns, strict=True)))


def kept_names(items: pa.Table) -> list[str]:
    """The columns besides those of ITEMS: values that are kept."""
    return items.column_names[len(ITEMS) :]


def kept_arrays(rows: list[dict[str, Any]], names: list[str]) -> dict[str, pa.Array]:
    """The columns of kept values, see `pipeline.dataset.fields`. A NaN is a missing value."""
    return {name: _kept_array([row.get(name) for row in rows]) for name in names}


def _kept_array(values: list[Any]) -> pa.Array:
    values = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
    return kept_array(map(kept_text, values), kept_type(Counter(map(kept_kind, values))))
