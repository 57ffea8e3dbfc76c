"""Datasets for benchmarks, and the data order that a run of the recipes would use."""

import shutil
from pathlib import Path

from pipeline.build.image_table import rows_of
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.loading.disk_cache import CHUNK_BYTES
from pipeline.loading.order import Order, default_block, default_lanes

SHARD_BYTES = 100 << 20


def make_order(dataset: Dataset, batch: int) -> Order:
    """The data order with seed 0, and lanes and block as the recipes set them."""
    lanes = default_lanes(batch)
    block = default_block(lanes, dataset.mean_sample_bytes, CHUNK_BYTES, 16 * 2**30)  # the recipes' memory_gb
    return Order(dataset.shard_samples, 0, batch, lanes, block)


def read_images(images: str | None) -> list[bytes]:
    """The images of a folder; without one, 256 synthetic scenes."""
    from pipeline.build.sources import open_source
    from pipeline.storage.store import open_store

    source = open_source(images or "synthetic:?count=256", lambda: open_store("."))
    return list(map(source.reader.open(), rows_of(source.items)))


def write_repeated(images: str | None, samples: int, folder: Path) -> Path:
    """Write `samples` files to class folders of FOLDER/images: the images of a folder or synthetic ones, repeated as often as
    needed."""
    repeated = folder / "images"
    found = read_images(images)
    for i in range(samples):
        path = repeated / f"{i // len(found):04d}" / f"{i % len(found):06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found[i % len(found)])
    return repeated


def build_from(files: Path, folder: Path) -> Dataset:
    """Build a dataset of these files in FOLDER/shards."""
    from pipeline.build.build import (  # imports webdataset, which is not needed with an existing dataset
        BuildOptions,
        build,
    )
    from pipeline.storage.store import open_store

    build(str(files), open_store(str(folder / "shards")), BuildOptions(shard_bytes=SHARD_BYTES))
    return open_dataset(str(folder / "shards"))


def build_repeated(images: str | None, samples: int, folder: Path) -> Dataset:
    """Build a dataset of the files of `write_repeated`, and delete the files."""
    files = write_repeated(images, samples, folder)
    dataset = build_from(files, folder)
    shutil.rmtree(files)
    return dataset
