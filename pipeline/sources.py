"""Where images come from when shards are built.

    a folder                      of class folders, or of images, anywhere that fsspec reaches
    ILSVRC2012_img_train.tar      a tar of class tars                                           pipeline.archives
    ILSVRC2012_img_val.tar        a tar of images, whose labels are in the devkit                pipeline.archives
    WebDataset tars               one, or a folder of them, with or without our index            pipeline.archives
    Parquet files                 one, or a folder of them, of images and labels                 pipeline.tables
    synthetic:?count=4096         drawn scenes

Of several files in a folder a pattern takes some: data/train-*.parquet.
"""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pyarrow as pa

from pipeline.ahead import Run
from pipeline.archives import dataset_source, tar_source, webdataset_source
from pipeline.errors import UserError
from pipeline.foreign import COMPRESSED_NAME
from pipeline.items import (
    IMAGE_EXTENSIONS,
    ITEMS,
    WHOLE,
    Ranges,
    Scenes,
    Source,
    is_image,
    key_of,
    make_source,
)
from pipeline.manifest import MANIFEST, NO_LABEL
from pipeline.scan import compressed
from pipeline.scenes import SHAPES
from pipeline.storage import Store, open_store
from pipeline.tables import parquet_source

SCENE_BYTES = 55_000  # of a drawn scene, about


def open_source(url: str, aside: Callable[[], Store], devkit: str | None = None, run: Run = map) -> Source:
    """Find all images of a source. UserError where there is none, or something is wrong with it.

    Args:
        url: see above.
        aside: gives the store where images are put that cannot be read one by one, when all else is known to be right.
        devkit: of ImageNet, for the labels of its validation images.
        run: does the work for several files, see `pipeline.ahead`.
    """
    if url.startswith("synthetic:"):
        return _synthetic(url)
    store = open_store(url)
    folder, _, name = store.url.rpartition("/")
    beside = open_store(folder or "/")
    if re.search(r"[*?\[]", name) and not store.exists(""):
        try:
            names = [n for n in beside.entries(folders=False) if fnmatchcase(n, name)]
        except FileNotFoundError:
            names = []
        if not names:
            raise UserError(f"{url}: no file has such a name")
        return _files(beside, names, aside, devkit, run)
    if COMPRESSED_NAME.search(name):
        raise UserError(compressed(beside, name))
    if name.endswith((".tar", ".parquet")):
        return _files(beside, [name], aside, devkit, run)
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
            f"{store.url} has no images in it (looked for {', '.join(IMAGE_EXTENSIONS)}, .tar and .parquet)"
        )
    return _files(store, names, aside, devkit, run)


def _files(
    store: Store, names: list[str], aside: Callable[[], Store], devkit: str | None, run: Run
) -> Source:
    """Files of one kind."""
    if len(names) == 1 and names[0].endswith(".tar"):
        return tar_source(store, names[0], devkit, run)
    if official := next((n for n in names if n.startswith("ILSVRC2012_img_")), None):
        raise UserError(
            f"{store.url} has several archives in it: name one, such as {store.describe(official)}"
        )
    if all(n.endswith(".tar") for n in names):
        return webdataset_source(store, names)
    if all(n.endswith(".parquet") for n in names):
        return parquet_source(store, names, aside, run)
    raise UserError(
        f"{store.url}: {names[0]} and {names[-1]} are not of one kind: name those that are meant, as *.tar"
    )


def _folder(store: Store, sizes: dict[str, int]) -> Source:
    """Class folders: the class of an image is the first folder of its path, the labels are the sorted names
    (as torchvision's ImageFolder). Images lying flat have no labels."""
    for name in sizes:
        if not name.isprintable() or any("\ud800" <= c <= "\udfff" for c in name):
            raise UserError(f"{store.url}: the file name {name!a} is not printable UTF-8: rename it")
    images = [name for name in sizes if is_image(name)]
    in_folders = [name for name in images if "/" in name]
    if in_folders and len(in_folders) != len(images):
        flat = next(name for name in images if "/" not in name)
        raise UserError(
            f"{store.url} has images both in class folders ({in_folders[0]}) and beside them ({flat}): "
            "move the latter away, or into a folder"
        )
    classes = sorted({name.split("/", 1)[0] for name in in_folders})
    empty = [f for f in store.entries(folders=True) if f not in classes and not f.startswith(".")]
    if classes and empty:
        raise UserError(
            f"{store.url}: the class folder {empty[0]} has no images in it, so it is not clear whether it counts as a "
            "class: put images into it, or remove it"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    items = pa.table(
        {
            "key": [key_of(name) for name in images],
            "label": [label_of[name.split("/", 1)[0]] if classes else NO_LABEL for name in images],
            "file": images,
            "offset": np.full(len(images), WHOLE),
            "size": [sizes[name] for name in images],
        },
        schema=ITEMS,
    )
    return make_source(store.url, classes, Ranges(store.url), items)


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
    return Source(description, items, names, Scenes(seed))
