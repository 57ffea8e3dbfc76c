"""ImageNet's official archives, made from a folder of class folders."""

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.io import savemat


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.uname = len(data), 1339550000, "imagenet"
    tar.addfile(member, io.BytesIO(data))


def classes_of(folder: Path) -> dict[str, list[Path]]:
    return {path.name: sorted(path.iterdir()) for path in sorted(folder.iterdir())}


def train_tar(folder: Path, to: Path) -> Path:
    """A tar of class tars."""
    with tarfile.open(to, "w", format=tarfile.GNU_FORMAT) as tar:
        for wnid, images in classes_of(folder).items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=tarfile.GNU_FORMAT) as of_class:
                for image in images:
                    add(of_class, image.name, image.read_bytes())
            add(tar, f"{wnid}.tar", inner.getvalue())
    return to


def validation_tar(folder: Path, to: Path) -> tuple[Path, Path]:
    """The validation tar and its devkit. The same images in class folders are written to `to`/tree."""
    rng = random.Random(0)
    images = [(wnid, path) for wnid, paths in classes_of(folder).items() for path in paths]
    rng.shuffle(images)
    wnids = sorted({wnid for wnid, _ in images})
    numbers = dict(zip(rng.sample(wnids, len(wnids)), range(1, len(wnids) + 1), strict=True))
    with tarfile.open(to / "ILSVRC2012_img_val.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for i, (wnid, path) in enumerate(images, 1):
            name = f"ILSVRC2012_val_{i:08d}.JPEG"
            add(tar, name, path.read_bytes())
            copy = to / "tree" / wnid / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    kind = [
        ("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"),
        ("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O"),
    ]  # fmt: skip
    # Numbers after those of the classes are the classes' ancestors in WordNet.
    rows = [(n, wnid, f"{wnid}, in words", "a thing", 0, 0, 0, 1300) for wnid, n in numbers.items()]
    rows += [(len(wnids) + 1, "n00001740", "entity", "that which is", 2, np.array([1, 2]), 1, 0)]
    synsets = np.array(
        [tuple(np.asarray(v) if not isinstance(v, str) else v for v in row) for row in rows], dtype=kind
    )
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets.reshape(-1, 1)})
    truth = "".join(f"{numbers[wnid]}\n" for wnid, _ in images)
    devkit = to / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(devkit, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"Introduction\n")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return to / "ILSVRC2012_img_val.tar", devkit


def parquet_files(folder: Path, to: Path, files: int = 2, names: list[str] | None = None) -> str:
    """Write Parquet files as Hugging Face's `datasets` does. Returns the pattern of their names."""
    to.mkdir()
    names = names or list(classes_of(folder))
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": label}
        for label, paths in enumerate(classes_of(folder).values())
        for path in paths
    ]
    random.Random(0).shuffle(rows)
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for i in range(files):
        table = pa.Table.from_pylist(rows[i::files], schema=schema)
        pq.write_table(table, to / f"train-{i:05d}-of-{files:05d}.parquet", row_group_size=10)
    return f"{to}/train-*.parquet"
