"""Promise 2 and 6 at sizes nobody can store here: see also benchmarks/scale.py."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.manifest import INDEX_ROW, SHARDS_SCHEMA, index_name, write_dataset
from pipeline.loading.disk_cache import CHUNK_BYTES, DiskCache
from pipeline.loading.order import Order
from pipeline.storage.store import open_store
from tests.support.data.noise import write_noise


@pytest.mark.parametrize("shards", [20_000, 1_000_000])
def test_the_order_holds_at_ten_thousand_million_samples(shards: int) -> None:
    rng = np.random.default_rng(shards)
    order = Order(rng.integers(9_000, 11_001, shards), 5, 4096, 1024, 128)
    epoch = order.steps_per_epoch
    for e in (0, 799):
        # Steps of one epoch, its borders and neighbours among them: no id twice.
        steps = {0, 1, epoch - 2, epoch - 1, *rng.integers(epoch, size=20).tolist()}
        ids = np.concatenate([order.step_ids(e * epoch + step) for step in sorted(steps)])
        assert len(np.unique(ids)) == len(steps) * 4096
        assert ids.min() >= 0
        assert ids.max() < order.samples
        parts = [order.step_ids(e * epoch + 7, rank, 96) for rank in range(96)]
        assert sorted(np.concatenate(parts)) == sorted(order.step_ids(e * epoch + 7))
        # A whole block of one lane is one place after the other, over one border of shards at most.
        lane = np.array([int(rng.integers(1024))])
        begin = int(order.block_ends(lane, np.array([order.lane_length // 2]))[0])
        block = np.sort(order.sample_ids(e, lane, np.arange(begin, begin + 128))[0])
        assert (np.diff(block) != 1).sum() <= 1
    if shards == 1_000_000:
        assert order.samples > 2**33


def test_the_kept_part_holds_at_a_petabyte() -> None:
    chunks = 1_100_000 * 10**9 // CHUNK_BYTES
    part = DiskCache("", chunks // 3, chunks)
    for first in (0, 1 << 30, chunks - 3000):
        assert 999 <= sum(map(part.holds, range(first, first + 3000))) <= 1001


def test_digests_are_read_when_somebody_asks(tmp_path: Path) -> None:
    count = 70_000
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]
    numbers = np.arange(count)
    columns = {"name": [f"{i}.tar" for i in range(count)], "samples": numbers, "bytes": numbers}
    table = pa.table({**columns, "sha256": digests[::-1], "content": digests}).cast(SHARDS_SCHEMA)
    write_dataset(open_store(str(tmp_path)), table, 1, [], {})
    before = pa.total_allocated_bytes()
    dataset = open_dataset(str(tmp_path))
    assert pa.total_allocated_bytes() - before < 40 * count
    assert dataset.fingerprint == hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert dataset.shard_content.to_pylist() == digests
    assert dataset.shard_sha256.to_pylist() == digests[::-1]


def test_indexes_stay_within_their_bound_and_each_is_read_once_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, reads = write_noise(tmp_path, 5, 120, 500), []
    one = 120 * INDEX_ROW.itemsize
    monkeypatch.setattr("pipeline.dataset.dataset.INDEX_BYTES", 3 * one)

    def read(shard: int) -> bytes:
        reads.append(shard)
        return (tmp_path / index_name(dataset.shard_name(shard))).read_bytes()

    ids = np.arange(dataset.samples)
    expected = dataset.locate(ids)
    assert dataset.indexes_bytes == 3 * one
    for _ in range(3):
        reads.clear()
        found = dataset.locate(ids, read)
        assert (found.row == expected.row).all()
        assert (found.shard == expected.shard).all()
        assert len(reads) == len(set(reads)) == 2  # the others were in memory
        assert dataset.indexes_bytes == 3 * one
