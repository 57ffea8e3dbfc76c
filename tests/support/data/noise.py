"""Datasets of random bytes, and readers over them."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from crc32c import crc32c

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import INDEX_SCHEMA, SHARDS_SCHEMA, content_digest, index_name, write_dataset
from pipeline.loading.disk_cache import DiskCache, open_disk_cache
from pipeline.loading.order import Order, Schedule
from pipeline.loading.readahead import Reader, Samples
from pipeline.storage.parquet import to_parquet
from pipeline.storage.store import open_store

CHUNK = 1 << 14


def write_noise(folder: Path, shards: int, samples: int, size: int, gap: int = 1024) -> Dataset:
    """A dataset of noise, about `size` bytes a sample: what is read is not looked at."""
    store, rng, rows, total = open_store(str(folder)), np.random.default_rng(0), [], 0
    for shard in range(shards):
        sizes = rng.integers(size // 2, size * 3 // 2, samples)
        offsets = np.cumsum(np.r_[512, sizes[:-1] + gap])
        data = rng.bytes(int(offsets[-1] + sizes[-1] + gap))
        images = [data[o : o + n] for o, n in zip(offsets, sizes, strict=True)]
        ones = np.ones(samples, np.int64)
        index = pa.table(
            {
                "key": [f"{shard}-{i}" for i in range(samples)],
                "offset": offsets,
                "size": sizes,
                "label": ones,
                "width": ones,
                "height": ones,
                "crc32c": [crc32c(image) for image in images],
            }
        ).cast(INDEX_SCHEMA)
        name = f"shard-{shard:06d}.tar"
        store.write(name, data)
        store.write(index_name(name), to_parquet(index))
        row = {"name": name, "samples": samples, "bytes": len(data), "sha256": ""}
        rows.append({**row, "content": content_digest(index)})
        total += int(sizes.sum())
    write_dataset(store, pa.Table.from_pylist(rows, SHARDS_SCHEMA), total, [], {})
    return open_dataset(str(folder))


def make_order(
    dataset: Dataset, global_batch: int = 24, lanes: int = 6, block: int = 16, seed: int = 0
) -> Order:
    return Order(dataset.shard_samples, seed, global_batch, lanes, block)


def make_reader(
    dataset: Dataset,
    order: Order,
    start: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    bound: int = 1 << 19,
    kept: DiskCache | None = None,
) -> Reader:
    lane_bytes = bound // len(order.lanes_of(rank, world_size))
    return Reader(dataset, order, Schedule.constant(rank, world_size), start, stop, lane_bytes, kept)


def chunks_of(dataset: Dataset) -> int:
    return int((-(-dataset.shard_bytes // CHUNK)).sum())


def disk_cache(
    dataset: Dataset, folder: Path, share: float
) -> "contextlib._GeneratorContextManager[DiskCache]":
    bound = int(share * dataset.shard_bytes.sum())
    return open_disk_cache(str(folder), bound, dataset.identity, chunks_of(dataset), CHUNK)


def assert_right(dataset: Dataset, samples: Samples) -> None:
    """Every sample's bytes are those of its place in the shard."""
    assert samples.changed == []
    located = dataset.locate(samples.ids)
    for i, data in enumerate(samples.encoded):
        shard = Path(dataset.shard_store.root, dataset.shard_name(int(located.shard[i])))
        with shard.open("rb") as file:
            assert bytes(data) == os.pread(file.fileno(), int(located.size[i]), int(located.offset[i]))
