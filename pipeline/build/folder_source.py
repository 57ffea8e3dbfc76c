"""A folder of class folders, or of images, as a source.

The class of an image is the first folder of its path. Classes are sorted and numbered, like torchvision's ImageFolder does.
If there are metadata files with labels beside the images, these are taken (`pipeline.build.metadata`).
Hidden files and files that are not images are left out, and counted in a note.
"""

import unicodedata
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from pipeline.build.columns import CLASS_FOLDERS, NO_LABELS
from pipeline.build.file_names import (
    count_by_extension,
    ignored_notes,
    is_hidden,
    is_image,
    key_of,
    split_of,
)
from pipeline.build.image_table import (
    ITEMS,
    WHOLE_FILE,
    RangeReader,
    Source,
    SourceOptions,
    kept_arrays,
    make_source,
    with_labels,
)
from pipeline.build.metadata import METADATA_NAMES, Metadata, is_metadata, read_metadata
from pipeline.dataset.fields import Fields
from pipeline.dataset.labels import LabelCollector
from pipeline.dataset.manifest import NO_LABEL, label_type
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
    merged = _merged_folders(store, images, options)
    class_of = [_class_of(name, merged) for name in images]
    metadata = _metadata(store, sizes, images, len(set(class_of) - {None}), options.fields)
    items = pa.table(
        {
            "key": [key_of(name) for name in images],
            "label": np.full(len(images), NO_LABEL),
            "file": images,
            "offset": np.full(len(images), WHOLE_FILE),
            "size": [sizes[name] for name in images],
        },
        schema=ITEMS,
    )
    classes: list[str] = []
    notes = [*ignored_notes(name for name in sizes if not is_metadata(name)), *metadata.notes]
    if metadata.has_labels:
        labels, classes, label_notes = _metadata_labels(images, metadata, options.fields)
        items = with_labels(items, labels)
        notes += label_notes
    elif _takes_folders(class_of, metadata, options.fields):
        classes = _classes(store, sizes, images, class_of, merged, options)
        label_of: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
        labels = pa.array([label_of.get(name, NO_LABEL) for name in class_of], label_type("class"))
        items = with_labels(items, labels)
        notes += [*_spelling_notes(classes), *_nesting_notes(store, images, classes, merged)]
    kept = [metadata.kept.get(name, {}) for name in images] if options.fields.keep else []
    for name, array in kept_arrays(kept, list(options.fields.columns)).items():
        items = items.append_column(name, array)
    return make_source(store.url, classes, RangeReader(store.url), items, notes)


def _merged_folders(store: Store, images: list[str], options: SourceOptions) -> frozenset[str]:
    """The folders at the top that are joined: splits, if the user says so. UserError if there are splits, and they don't."""
    splits = _splits(sorted({name.split("/", 1)[0] for name in images if "/" in name}))
    if splits and options.splits is None:
        raise UserError(_splits_message(store, splits))
    return frozenset(splits) if options.splits == "merge" else frozenset()


def _metadata(
    store: Store, sizes: dict[str, int], images: list[str], folders: int, fields: Fields
) -> Metadata:
    """What the folder's metadata files say. UserError if there are none, and an option names one of their columns."""
    names = [name for name in sizes if is_metadata(name)]
    is_ignored = fields.label in (NO_LABELS, CLASS_FOLDERS) and not fields.keep and fields.image is None
    if names and not is_ignored:
        return read_metadata(store, names, images, fields, folders)
    options = {
        "--image": fields.image,
        "--label": fields.label if fields.label not in (NO_LABELS, CLASS_FOLDERS) else None,
        "--keep-json": ",".join(fields.keep) or None,
    }
    for option, value in options.items():
        if value is not None:
            raise UserError(
                f"{option} {value}: {store.url} has images, and no metadata file with columns ({', '.join(METADATA_NAMES)})"
            )
    return Metadata()


def _metadata_labels(
    images: list[str], metadata: Metadata, fields: Fields
) -> tuple[pa.Array, list[str], list[str]]:
    """The labels of the images by their metadata, the class names, and notes. UserError if labels contradict each other."""
    texts = [metadata.labels.get(name, "") for name in images]
    collector = LabelCollector(fields.kind)
    collector.add(texts, images.__getitem__)
    encoder = collector.encoder()
    if encoder.first_problem:
        raise UserError(f"{encoder.first_problem}; --label chooses another column")
    classes = encoder.classes
    if encoder.kind != "numbers" and not encoder.by_name and len(metadata.class_names) >= len(classes) > 0:
        classes = metadata.class_names
    return encoder.encode(texts), classes, [encoder.note] if encoder.note else []


def _takes_folders(class_of: list[str | None], metadata: Metadata, fields: Fields) -> bool:
    """Whether the labels are the class folders. One folder beside metadata, such as images/, is no class."""
    if fields.label == NO_LABELS or not any(class_of):
        return False
    if fields.kind not in (None, "class"):
        raise UserError(
            f"--label-kind {fields.kind}: class folders give one class for each image; leave it out"
        )
    return fields.label == CLASS_FOLDERS or not metadata.was_read or len(set(class_of)) > 1


def _classes(
    store: Store,
    sizes: dict[str, int],
    images: list[str],
    class_of: list[str | None],
    merged: frozenset[str],
    options: SourceOptions,
) -> list[str]:
    """The names of the class folders. UserError if some have no images, or some images are in none."""
    if options.fields.label != CLASS_FOLDERS:
        _check_all_in_classes(store, images, class_of)
    classes = {name for name in class_of if name is not None}
    empty = _empty_classes(store, sizes, classes, merged)
    if empty and not options.allow_empty_classes:
        raise UserError(_empty_message(store, empty))
    return sorted({*classes, *empty})


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
        f"move the latter away, or into a class folder. --label {CLASS_FOLDERS} takes them without a label, and --label "
        f"{NO_LABELS} takes all without labels"
    )


def _empty_classes(
    store: Store, sizes: dict[str, int], classes: set[str], merged: frozenset[str]
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


def _spelling_notes(classes: list[str]) -> Iterable[str]:
    """Notes about classes that are probably one."""
    spelled: dict[str, str] = {}
    for name in classes:
        other = spelled.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), name)
        if other != name:
            yield f"the class folders {other!r} and {name!r} differ only in case, accents' encoding or spaces: they are two classes"


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
