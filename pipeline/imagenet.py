"""What ImageNet's 1000 classes are, and how its official archives say which image is of which.

ILSVRC2012_img_train.tar         n01440764.tar, …; in each n01440764_10026.JPEG, …
ILSVRC2012_img_val.tar           ILSVRC2012_val_00000001.JPEG, …
ILSVRC2012_devkit_t12.tar.gz     …/data/meta.mat: number, wnid and words of each class, and
                                 …/data/ILSVRC2012_validation_ground_truth.txt: a line an image, the number of its class
"""

import functools
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.storage import open_store

WNID = re.compile(r"n\d{8}")
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
IMAGES = {1_281_167: "train", 50_000: "val"}  # Russakovsky et al. 2015, arXiv 1409.0575, Table 2
OF_A_CLASS = {"train": (732, 1300), "val": (50, 50)}  # fewest and most, the same table


@functools.cache
def wnids() -> tuple[str, ...]:
    """The 1000 classes, sorted: the place of each is its label."""
    return tuple(Path(__file__).with_name("imagenet_wnids.txt").read_text().split())


def remarks(classes: list[str], counts: Sequence[int]) -> tuple[str, ...]:
    """What is unusual about images that seem to be ImageNet's, a line each: they may be a part of it, or incomplete.

    Args:
        classes: names.
        counts: images of each class.
    """
    if not classes or not all(WNID.fullmatch(name) for name in classes):
        return ()
    lines = []
    missing, strange = sorted(set(wnids()) - set(classes)), sorted(set(classes) - set(wnids()))
    if strange:
        return (f"{len(strange)} classes are not among ImageNet's 1000: {_some(strange)}",)
    if missing:
        lines.append(
            f"{len(missing)} of ImageNet's 1000 classes are missing ({_some(missing)}), so labels are those of this "
            "subset and not ImageNet's"
        )
    total = sum(counts)
    split = IMAGES.get(total)
    if split is None and not missing:
        lines.append(f"{total:,} images: ImageNet has 1,281,167 for training and 50,000 for validation")
    if split is not None:
        fewest, most = OF_A_CLASS[split]
        odd = [name for name, n in zip(classes, counts, strict=True) if not fewest <= n <= most]
        if odd:
            lines.append(f"{len(odd)} classes do not have {fewest} to {most} images: {_some(odd)}")
    return tuple(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def read_devkit(url: str) -> list[str]:
    """The wnid of each validation image, in the order of their numbers."""
    from scipy.io import loadmat  # a second, and only here

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
    except Exception as error:  # damaged bytes make tarfile, zlib and scipy raise nearly anything
        raise UserError(
            f"{store.describe(name)} is not ImageNet's devkit ({type(error).__name__}: {error}): what is needed is "
            f"{DEVKIT}, as it was downloaded"
        ) from None


def _member(tar: tarfile.TarFile, ending: str) -> bytes:
    name = next((name for name in tar.getnames() if f"/{name}".endswith(ending)), None)
    file = tar.extractfile(name) if name else None
    if file is None:
        raise ValueError(f"it has no {ending.removeprefix('/')}")
    return file.read()
