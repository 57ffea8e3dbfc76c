"""The sources that a dataset can be built from.

    a folder                      of class folders, or of images
    ILSVRC2012_img_train.tar      ImageNet's training images: a tar of one tar per class        pipeline.build.tar_source
    ILSVRC2012_img_val.tar        ImageNet's validation images; their labels are in the devkit  pipeline.build.tar_source
    WebDataset tars               one tar, or a folder of tars                                  pipeline.build.tar_source
    a dataset                     a folder with manifest.json                                   pipeline.build.tar_source
    Parquet files                 one file, or a folder of files, with images and labels        pipeline.build.parquet_source
    synthetic:?count=4096         images drawn by pipeline.build.synthetic

Folders and files can be local or at any URL that fsspec supports. A pattern selects files of a folder:
data/train-*.parquet.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pyarrow as pa

from pipeline.build.file_names import IMAGE_EXTENSIONS, count_by_extension, file_split, is_hidden, is_image
from pipeline.build.folder_source import folder_source
from pipeline.build.image_table import ITEMS, SceneRenderer, Source, SourceOptions
from pipeline.build.parquet_source import parquet_source
from pipeline.build.synthetic import SHAPES
from pipeline.build.tar_source import dataset_source, tar_source, webdataset_source
from pipeline.dataset.fields import Fields
from pipeline.dataset.index import COMPRESSED_NAME
from pipeline.dataset.manifest import MANIFEST
from pipeline.dataset.webdataset import compressed_message
from pipeline.errors import UserError
from pipeline.parallel import ParallelMap
from pipeline.storage.store import Store, open_store

SCENE_BYTES = 55_000  # average size of a synthetic image


def open_source(
    url: str,
    open_spool: Callable[[], Store],
    devkit: str | None = None,
    run: ParallelMap = map,
    options: SourceOptions | None = None,
) -> Source:
    """Find all images of a source. UserError if there are none, or the source is not valid.

    Args:
        url: see the top of this module.
        open_spool: returns the store for images that must be extracted first, see `pipeline.build.parquet_source`. Called
            once the source is known to be valid.
        devkit: path or URL of ImageNet's devkit, for the labels of its validation images.
        run: does the work for several files, see `pipeline.parallel`.
        options: how the source is understood.
    """
    options = options or SourceOptions()
    if url.startswith("synthetic:"):
        _check_unused(url, "are drawn", options)
        return _synthetic(url)
    store = open_store(url)
    folder, _, name = store.url.rpartition("/")
    parent = open_store(folder or "/")
    if re.search(r"[*?\[]", name) and not store.exists(""):
        try:
            names = [n for n in parent.entries(folders=False) if fnmatchcase(n, name)]
        except FileNotFoundError:
            names = []
        if not names:
            raise UserError(f"{url}: no file matches this pattern")
        return _files(parent, names, open_spool, devkit, run, options)
    if COMPRESSED_NAME.search(name):
        raise UserError(compressed_message(parent, name))
    if name.endswith((".tar", ".parquet")):
        return _files(parent, [name], open_spool, devkit, run, options)
    if store.exists(MANIFEST):
        _check_unused(store.url, "are those of a dataset", options)
        return dataset_source(store)
    sizes = store.sizes()
    if not sizes and not store.exists(""):
        raise UserError(f"{store.url}: no such file or folder")
    if any(map(is_image, sizes)):
        _check_no_split_at(store.url, options)
        return folder_source(store, sizes, options)
    visible = [name for name in sizes if not is_hidden(name)]
    tars = [n for n in visible if n.endswith(".tar")]
    names = tars or [n for n in visible if n.endswith(".parquet")]
    if not names:
        found = f"; it has {count_by_extension(visible)}" if visible else ""
        raise UserError(
            f"{store.url} has no images in it (expected {', '.join(IMAGE_EXTENSIONS)}, .tar or .parquet files{found})"
        )
    return _files(store, names, open_spool, devkit, run, options)


def _files(
    store: Store,
    names: list[str],
    open_spool: Callable[[], Store],
    devkit: str | None,
    run: ParallelMap,
    options: SourceOptions,
) -> Source:
    """The source for tars or for Parquet files."""
    if any(name.endswith(".tar") for name in names):
        _check_unused(store.url, "are in tars", replace(options, fields=Fields()))
    if len(names) == 1 and names[0].endswith(".tar"):
        return tar_source(store, names[0], devkit, run, options.fields)
    if official := next((n for n in names if n.startswith("ILSVRC2012_img_")), None):
        raise UserError(
            f"{store.url} has several archives in it: choose one, such as {store.describe(official)}"
        )
    if all(n.endswith(".tar") for n in names):
        source = webdataset_source(store, names, options.fields)
        return replace(source, notes=(*source.notes, *_splits_note(store, names)))
    if all(n.endswith(".parquet") for n in names):
        _check_no_split_at(store.url, options)
        return parquet_source(store, names, open_spool, run, options)
    raise UserError(
        f"{store.url}: {names[0]} and {names[-1]} are of different types: select one with a pattern, such as *.tar"
    )


def _splits_note(store: Store, names: list[str]) -> list[str]:
    """A note if tars belong to several splits, such as train-0000.tar and val-0000.tar."""
    patterns = {split: pattern for split, pattern in map(file_split, names) if split}
    if len(patterns) < 2:
        return []
    pattern = store.describe(patterns[min(patterns)])
    return [
        f"the tars are of several splits ({', '.join(sorted(patterns))}); '{pattern}' selects one of them"
    ]


def _check_unused(where: str, why: str, options: SourceOptions) -> None:
    """UserError if there are options for a source that has no use for them."""
    if options != SourceOptions():
        names = {"splits": "--splits", "allow_empty_classes": "--allow-empty-classes"}
        used = [
            names.get(name, "--image, --label, --label-kind, --keep-json and --split-at")
            for name in options.changes()
        ]
        raise UserError(
            f"{where}: its images {why}; {' and '.join(used)} are for other sources: leave them out"
        )


def _check_no_split_at(where: str, options: SourceOptions) -> None:
    if options.fields.split_at != "first-dot":
        raise UserError(f"{where}: --split-at is for the names of files in tars: leave it out")


def _synthetic(url: str) -> Source:
    options = {"count": 4096, "classes": len(SHAPES), "seed": 0}
    for name, value in parse_qsl(urlsplit(url).query, keep_blank_values=True):
        if name not in options:
            raise UserError(f"{url}: unknown option {name}; the options are {', '.join(options)}")
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"{url}: {name} must be a whole number, not {value!r}")
        options[name] = int(value)
    count, classes, seed = options.values()
    if count < 1 or not 1 <= classes <= len(SHAPES):
        raise UserError(f"{url}: count must be at least 1, and classes 1 to {len(SHAPES)}")
    names = list(SHAPES)[:classes]
    numbers = np.arange(count)
    items = pa.table(
        {
            "key": [f"{names[i % classes]}/{i:08d}" for i in range(count)],
            "label": numbers % classes,
            "file": pa.nulls(count, pa.string()).fill_null(""),
            "offset": numbers,
            "size": np.full(count, SCENE_BYTES),
        }
    ).cast(ITEMS)
    description = f"synthetic:?count={count}&classes={classes}&seed={seed}"
    return Source(description, items, names, SceneRenderer(seed))
