"""Datasets for benchmarks, and the order in which a run of the recipes would read them."""

import shutil
from pathlib import Path

from pipeline.cache import CHUNK_BYTES
from pipeline.items import rows_of
from pipeline.manifest import Dataset, open_dataset
from pipeline.order import Order, default_block, default_lanes

SHARD_BYTES = 100 << 20


def make_order(dataset: Dataset, batch: int) -> Order:
    lanes = default_lanes(batch)
    block = default_block(lanes, dataset.mean_sample_bytes, CHUNK_BYTES, 16 * 2**30)  # the recipes' memory_gb
    return Order(dataset.shard_samples, 0, batch, lanes, block)


def read_images(images: str | None) -> list[bytes]:
    """The images of a folder (none: drawn scenes)."""
    from pipeline.sources import open_source
    from pipeline.storage import open_store

    source = open_source(images or "synthetic:?count=256", lambda: open_store("."))
    return list(map(source.reader.open(), rows_of(source.items)))


def write_repeated(images: str | None, samples: int, folder: Path) -> Path:
    """So many files in class folders of FOLDER/images: the images of a folder (none: drawn scenes), with repeats."""
    repeated = folder / "images"
    found = read_images(images)
    for i in range(samples):
        path = repeated / f"{i // len(found):04d}" / f"{i % len(found):06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found[i % len(found)])
    return repeated


def build_from(files: Path, folder: Path) -> Dataset:
    """A dataset in FOLDER/shards."""
    from pipeline.shards import (  # with webdataset, which a benchmark of a ready dataset can do without
        Options,
        build,
    )
    from pipeline.storage import open_store

    build(str(files), open_store(str(folder / "shards")), Options(shard_bytes=SHARD_BYTES))
    return open_dataset(str(folder / "shards"))


def build_repeated(images: str | None, samples: int, folder: Path) -> Dataset:
    """A dataset of `write_repeated`'s files, which are gone afterwards."""
    files = write_repeated(images, samples, folder)
    dataset = build_from(files, folder)
    shutil.rmtree(files)
    return dataset
