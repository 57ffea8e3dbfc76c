"""A folder of class folders, or of images, as a source.

The class of an image is the first folder of its path. Classes are sorted and numbered, like torchvision's ImageFolder does.
Hidden files and files that are not images are left out, and counted in a note.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.build.file_names import (
    count_by_extension,
    ignored_notes,
    is_hidden,
    is_image,
    key_of,
    split_of,
)
from pipeline.build.image_table import ITEMS, WHOLE_FILE, RangeReader, Source, SourceOptions, make_source
from pipeline.dataset.manifest import NO_LABEL
from pipeline.errors import UserError
from pipeline.storage.store import Store, open_store
from pipeline.text import plural


def folder_source(store: Store, sizes: dict[str, int], options: SourceOptions) -> Source:
    """The images of a folder.

    Args:
        sizes: bytes of each file below the folder, sorted by name; at least one is an image.

    UserError if it is unclear what the classes are.
    """
    images = [name for name in sizes if is_image(name)]
    for name in images:
        if not name.isprintable() or any("\ud800" <= c <= "\udfff" for c in name):
            raise UserError(f"{store.url}: the file name {name!a} is not printable UTF-8: rename it")
    top = sorted({name.split("/", 1)[0] for name in images if "/" in name})
    splits = _splits(top)
    if splits and options.splits is None:
        raise UserError(_splits_message(store, splits))
    merged = frozenset(splits) if options.splits == "merge" else frozenset[str]()
    class_of = [_class_of(name, merged) for name in images]
    _check_all_in_classes(store, images, class_of)
    classes = sorted({name for name in class_of if name is not None})
    if classes:
        empty = _empty_classes(store, sizes, classes, merged)
        if empty and not options.allow_empty_classes:
            raise UserError(_empty_message(store, empty))
        classes = sorted({*classes, *empty})
    label_of: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    label_of[None] = NO_LABEL
    items = pa.table(
        {
            "key": [key_of(name) for name in images],
            "label": [label_of[name] for name in class_of],
            "file": images,
            "offset": np.full(len(images), WHOLE_FILE),
            "size": [sizes[name] for name in images],
        },
        schema=ITEMS,
    )
    source = make_source(store.url, classes, RangeReader(store.url), items)
    notes = [*ignored_notes(sizes), *_nesting_notes(store, images, classes, merged)]
    return replace(source, notes=(*source.notes, *notes))


def _class_of(name: str, merged: frozenset[str]) -> str | None:
    """The class folder of an image; None if it is in none. Folders in `merged` are not classes, but those in them are."""
    first, _, rest = name.partition("/")
    if first in merged:
        first, _, rest = rest.partition("/")
    return first if rest else None


def _splits(folders: list[str]) -> list[str]:
    """Those of the top folders that look like splits. Empty if there is only one beside others: it may be a class."""
    splits = [name for name in folders if split_of(name)]
    is_sure = len(splits) == len(folders) or len({split_of(name) for name in splits}) > 1
    return splits if is_sure else []


def _splits_message(store: Store, splits: list[str]) -> str:
    names = " and ".join(f"{name}/" for name in splits[:3])
    return (
        f"{store.url} has {names} in it: give one of them, such as {store.describe(splits[0])}. If they are parts of one "
        "dataset, add --splits merge; if they are classes, add --splits classes"
    )


def _check_all_in_classes(store: Store, images: list[str], class_of: list[str | None]) -> None:
    """UserError if some images are in class folders and others are not."""
    if None not in class_of or not any(class_of):
        return
    outside = images[class_of.index(None)]
    inside = next(name for name, of in zip(images, class_of, strict=True) if of)
    raise UserError(
        f"{store.url} has images both in class folders ({inside}) and outside of them ({outside}): "
        "move the latter away, or into a class folder"
    )


def _empty_classes(
    store: Store, sizes: dict[str, int], classes: list[str], merged: frozenset[str]
) -> dict[str, list[str]]:
    """Folders at the place of class folders that have no images. Returns the names of the files in each."""
    parents = [store, *(open_store(store.describe(name)) for name in sorted(merged))]
    folders = {name for parent in parents for name in parent.entries(folders=True) if not is_hidden(name)}
    empty: dict[str, list[str]] = {name: [] for name in sorted(folders - {*classes, *merged})}
    for name in sizes if empty else ():
        if (folder := _class_of(name, merged)) in empty:
            empty[folder].append(name)
    return empty


def _empty_message(store: Store, empty: dict[str, list[str]]) -> str:
    name, files = next(iter(empty.items()))
    has = f" (it has {count_by_extension(files)})" if files else ""
    more = f", and {plural(len(empty) - 1, 'other')} as well" if len(empty) > 1 else ""
    return (
        f"{store.url}: the class folder {name} has no images in it{has}{more}, so it is unclear whether it is a class: "
        "add images to it, or remove it, or add --allow-empty-classes to make it a class"
    )


def _nesting_notes(
    store: Store, images: list[str], classes: list[str], merged: frozenset[str]
) -> Iterable[str]:
    """Notes about folders inside the class folders where the wrong folder was perhaps given."""
    if not classes or merged:
        return
    inner = sorted({name.split("/", 2)[1] for name in images if name.count("/") > 1})
    if len(classes) == 1 and inner:
        yield (
            f"all images are in one class, {classes[0]}. To make the folders in it the classes ({', '.join(inner[:3])}"
            f"{', …' if len(inner) > 3 else ''}), give {store.describe(classes[0])}"
        )
    elif len({split_of(name) for name in inner} - {None}) > 1:
        names = " and ".join(f"{name}/" for name in inner if split_of(name))
        yield f"the class folders have {names} in them: the images of all of these are taken"
