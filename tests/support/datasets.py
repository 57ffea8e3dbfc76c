"""Datasets that tests build, and the photographs that some of them need."""

import os

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.storage.store import open_store

# A folder of class folders with ImageNet photographs. The repository has none: tests that need them are skipped without it.
IMAGENET_SAMPLE = os.environ.get("MAESTREAM_IMAGENET_SAMPLE")


def build_dataset(
    source: str, dest: str, shard_bytes: int = 1 << 20, seed: int = 0, overwrite: bool = False
) -> Dataset:
    from pipeline.build.build import build  # with webdataset, which a machine for tests/gpu need not have
    from pipeline.build.shard_writer import BuildOptions

    build(source, open_store(dest), BuildOptions(shard_bytes=shard_bytes, seed=seed), overwrite=overwrite)
    return open_dataset(dest)
