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
from fnmatch import fnmatchcase
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pyarrow as pa

from pipeline.build.image_table import (
    IMAGE_EXTENSIONS,
    ITEMS,
    WHOLE_FILE,
    RangeReader,
    SceneRenderer,
    Source,
    is_image,
    key_of,
    make_source,
)
from pipeline.build.parquet_source import parquet_source
from pipeline.build.synthetic import SHAPES
from pipeline.build.tar_source import dataset_source, tar_source, webdataset_source
from pipeline.dataset.index import COMPRESSED_NAME
from pipeline.dataset.manifest import MANIFEST, NO_LABEL
from pipeline.dataset.webdataset import compressed_message
from pipeline.errors import UserError
from pipeline.parallel import ParallelMap
from pipeline.storage.store import Store, open_store

SCENE_BYTES = 55_000  # average size of a synthetic image


def open_source(
    url: str, open_spool: Callable[[], Store], devkit: str | None = None, run: ParallelMap = map
) -> Source:
    """Find all images of a source. UserError if there are none, or the source is not valid.

    Args:
        url: see the top of this module.
        open_spool: returns the store for images that must be extracted first, see `pipeline.build.parquet_source`. Called
            once the source is known to be valid.
        devkit: path or URL of ImageNet's devkit, for the labels of its validation images.
        run: does the work for several files, see `pipeline.parallel`.
    """
    if url.startswith("synthetic:"):
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
        return _files(parent, names, open_spool, devkit, run)
    if COMPRESSED_NAME.search(name):
        raise UserError(compressed_message(parent, name))
    if name.endswith((".tar", ".parquet")):
        return _files(parent, [name], open_spool, devkit, run)
    if store.exists(MANIFEST):
        return dataset_source(store)
    sizes = store.sizes()
    if not sizes and not store.exists(""):
        raise UserError(f"{store.url}: no such file or folder")
    if any(map(is_image, sizes)):
        return _folder(store, sizes)
    visible = [n for n in sizes if not n.rpartition("/")[2].startswith(".")]
    tars = [n for n in visible if n.endswith(".tar")]
    names = tars or [n for n in visible if n.endswith(".parquet")]
    if not names:
        raise UserError(
            f"{store.url} has no images in it (expected {', '.join(IMAGE_EXTENSIONS)}, .tar or .parquet files)"
        )
    return _files(store, names, open_spool, devkit, run)


def _files(
    store: Store, names: list[str], open_spool: Callable[[], Store], devkit: str | None, run: ParallelMap
) -> Source:
    """The source for tars or for Parquet files."""
    if len(names) == 1 and names[0].endswith(".tar"):
        return tar_source(store, names[0], devkit, run)
    if official := next((n for n in names if n.startswith("ILSVRC2012_img_")), None):
        raise UserError(
            f"{store.url} has several archives in it: choose one, such as {store.describe(official)}"
        )
    if all(n.endswith(".tar") for n in names):
        return webdataset_source(store, names)
    if all(n.endswith(".parquet") for n in names):
        return parquet_source(store, names, open_spool, run)
    raise UserError(
        f"{store.url}: {names[0]} and {names[-1]} are of different types: select one with a pattern, such as *.tar"
    )


def _folder(store: Store, sizes: dict[str, int]) -> Source:
    """A folder of class folders, or of images without labels.

    The class of an image is the first folder of its path. Classes are sorted and numbered, like torchvision's
    ImageFolder does.
    """
    for name in sizes:
        if not name.isprintable() or any("\ud800" <= c <= "\udfff" for c in name):
            raise UserError(f"{store.url}: the file name {name!a} is not printable UTF-8: rename it")
    images = [name for name in sizes if is_image(name)]
    in_folders = [name for name in images if "/" in name]
    if in_folders and len(in_folders) != len(images):
        outside = next(name for name in images if "/" not in name)
        raise UserError(
            f"{store.url} has images both in class folders ({in_folders[0]}) and outside of them ({outside}): "
            "move the latter away, or into a class folder"
        )
    classes = sorted({name.split("/", 1)[0] for name in in_folders})
    empty = [f for f in store.entries(folders=True) if f not in classes and not f.startswith(".")]
    if classes and empty:
        raise UserError(
            f"{store.url}: the class folder {empty[0]} has no images in it, so it is unclear whether it is a class: "
            "add images to it, or remove it"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    items = pa.table(
        {
            "key": [key_of(name) for name in images],
            "label": [label_of[name.split("/", 1)[0]] if classes else NO_LABEL for name in images],
            "file": images,
            "offset": np.full(len(images), WHOLE_FILE),
            "size": [sizes[name] for name in images],
        },
        schema=ITEMS,
    )
    return make_source(store.url, classes, RangeReader(store.url), items)


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
