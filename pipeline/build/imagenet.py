"""ImageNet's 1000 classes, and how its official archives give the class of each image.

A class is named by its wnid (WordNet id), such as n01440764. The label is its place among the sorted wnids.

ILSVRC2012_img_train.tar      one tar per class, n01440764.tar, …, with n01440764_10026.JPEG, …
ILSVRC2012_img_val.tar        ILSVRC2012_val_00000001.JPEG, …
ILSVRC2012_devkit_t12.tar.gz  data/meta.mat: number, wnid and name of each class;
                              data/ILSVRC2012_validation_ground_truth.txt: one line per validation image, its class number
"""

import functools
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.storage.store import open_store
from pipeline.text import plural

WNID = re.compile(r"n\d{8}")
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SPLITS = {1_281_167: "train", 50_000: "val"}  # Russakovsky et al. 2015, arXiv 1409.0575, Table 2
IMAGES_PER_CLASS = {"train": (732, 1300), "val": (50, 50)}  # minimum and maximum, same table


@functools.cache
def wnids() -> tuple[str, ...]:
    """The wnids of the 1000 classes, sorted: the index of each is its label."""
    return tuple(Path(__file__).with_name("imagenet_wnids.txt").read_text().split())


def find_oddities(classes: list[str], counts: Sequence[int]) -> tuple[str, ...]:
    """Return how images whose classes are wnids differ from ImageNet, one line each. They may be a subset, or incomplete.

    Args:
        classes: class names. If they are not all wnids, the result is empty.
        counts: number of images per class.
    """
    if not classes or not all(WNID.fullmatch(name) for name in classes):
        return ()
    lines = []
    missing, unknown = sorted(set(wnids()) - set(classes)), sorted(set(classes) - set(wnids()))
    if unknown:
        return (
            f"{plural(len(unknown), 'class', 'classes')} not among ImageNet's 1000: {_first_few(unknown)}",
        )
    if missing:
        lines.append(
            f"{len(missing)} of ImageNet's 1000 classes missing ({_first_few(missing)}): the labels number the classes "
            "that are present, so they differ from ImageNet's"
        )
    total = sum(counts)
    split = SPLITS.get(total)
    if split is None and not missing:
        lines.append(f"{total:,} images: ImageNet has 1,281,167 for training and 50,000 for validation")
    if split is not None:
        fewest, most = IMAGES_PER_CLASS[split]
        odd = [name for name, n in zip(classes, counts, strict=True) if not fewest <= n <= most]
        if odd:
            lines.append(
                f"{plural(len(odd), 'class', 'classes')} without the usual {fewest} to {most} images: {_first_few(odd)}"
            )
    return tuple(lines)


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def read_devkit(url: str) -> list[str]:
    """Return the wnid of each validation image, in the order of their numbers. UserError if the file is not the devkit.

    `url`: of ILSVRC2012_devkit_t12.tar.gz.
    """
    from scipy.io import loadmat  # takes a second to import, and is used only here

    folder, _, name = open_store(url).url.rpartition("/")
    store = open_store(folder or "/")
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)}: no such file") from None
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            meta = _member(tar, "/data/meta.mat")
            truth = _member(tar, "/data/ILSVRC2012_validation_ground_truth.txt")
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid_of = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        return [wnid_of[number] for number in np.loadtxt(io.BytesIO(truth), dtype=np.int64, ndmin=1).tolist()]
    except Exception as error:  # on damaged bytes tarfile, zlib and scipy raise almost any exception
        raise UserError(
            f"{store.describe(name)} is not ImageNet's devkit ({type(error).__name__}: {error}): pass {DEVKIT} as "
            "downloaded"
        ) from None


def _member(tar: tarfile.TarFile, ending: str) -> bytes:
    name = next((name for name in tar.getnames() if f"/{name}".endswith(ending)), None)
    file = tar.extractfile(name) if name else None
    if file is None:
        raise ValueError(f"it has no {ending.removeprefix('/')}")
    return file.read()
