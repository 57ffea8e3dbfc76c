"""A worker becomes another one of more or fewer workers while it runs, and its batches are those of a new loader."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.decoder import Decoded
from pipeline.errors import UserError
from pipeline.loading.loader import PREFETCH_BATCHES, Loader
from pipeline.loading.order import Order, Schedule, Worker
from pipeline.loading.readahead import Reader
from pipeline.loading.weighted import Weight
from pipeline.stage_times import StageTimes
from pipeline.storage.store import open_store
from pipeline.views.mix import make_mix, parse_weight
from tests.support.data.noise import assert_right, make_order, make_reader, write_noise
from tests.support.processes import processes, wait_until

pytestmark = pytest.mark.integration


class Checksums:
    """A decoder whose images are numbers that depend on bytes, box and flip."""

    size = (1, 1)

    def __init__(self):
        self.calls = 0

    def __call__(self, encoded, boxes, flips):
        self.calls += 1
        crops = np.c_[boxes, flips].astype(np.int64)
        sums = [crc32c(row.tobytes(), crc32c(data)) for data, row in zip(encoded, crops, strict=True)]
        return Decoded(torch.tensor(sums, dtype=torch.int64), {}, StageTimes())

    def close(self):
        pass


def order_of(dataset: Dataset, lanes: int = 6, block: int = 4, batch: int = 12) -> Order:
    weights = tuple(Weight(p.shards, p.times) for p in dataset.parts) if dataset.manifest.weighted else ()
    return Order(dataset.shard_samples, 0, batch, lanes, block, weights)


def make(dataset, order, rank=0, world_size=1, cache=None) -> Loader:
    return Loader(dataset, order, Checksums(), rank, world_size, cache)


def assert_same(batch, order, dataset, worker) -> None:
    expected = make(dataset, order, *worker).batch(batch.step)
    assert batch.sample_ids.tolist() == expected.sample_ids.tolist()
    assert batch.images.tolist() == expected.images.tolist()
    assert batch.labels.tolist() == expected.labels.tolist()
    assert batch.draws is None or batch.draws.tolist() == expected.draws.tolist()


def workers(lanes: int) -> st.SearchStrategy[Worker]:
    return st.integers(1, lanes).flatmap(lambda w: st.builds(Worker, st.integers(0, w - 1), st.just(w)))


def assert_batches_after_random_changes(dataset: Dataset, data: st.DataObject, cache=None) -> None:
    order = order_of(
        dataset, data.draw(st.sampled_from([1, 2, 6, 12])), data.draw(st.integers(1, 20), label="block")
    )
    start = data.draw(st.integers(0, 2 * order.steps_per_epoch), label="start")
    stop = (start // order.steps_per_epoch + 2) * order.steps_per_epoch
    worker = data.draw(workers(order.lanes), label="worker")
    loader = make(dataset, order, *worker, cache)
    loader.lane_bytes = data.draw(st.sampled_from([0, 100_000, loader.lane_bytes]), label="lane bytes")
    of_step = dict.fromkeys(range(start, stop), worker)  # what each batch has to be
    if data.draw(st.booleans(), label="prepare"):
        loader.prepare(data.draw(st.integers(max(start - 2, 0), start + 3)), stop)
    batches, last, following, reader = loader.steps(start, stop), start, start, None
    for _ in range(40):
        if data.draw(st.integers(0, 2)) == 0:
            for _ in range(data.draw(st.integers(1, 3))):
                step, worker = (
                    data.draw(st.integers(last, stop + 1), label="from"),
                    data.draw(workers(order.lanes)),
                )
                loader.change_workers(step, *worker)
                of_step |= dict.fromkeys(range(step, stop), worker)
                following = min(following, step)
        elif data.draw(st.integers(0, 9)) == 0 and following > start:
            following = data.draw(st.integers(following, stop), label="skip to")
            loader.skip_to(following)
        time.sleep(data.draw(st.sampled_from([0, 0, 0.003])))
        batch = next(batches, None)
        if following >= stop:
            assert batch is None
            break
        assert batch.step == following
        assert_same(batch, order, dataset, of_step[following])
        reader, last, following = loader.prefetcher.reader, following, following + 1
    batches.close()
    if reader and following >= stop:
        reader._release_until(stop)
        assert (reader.places, reader.blocks, list(reader.queue), reader.held_bytes) == ({}, {}, [], 0)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_batches_are_those_of_a_new_loader_after_any_changes(scenes: Dataset, data: st.DataObject) -> None:
    assert_batches_after_random_changes(scenes, data)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_same_with_a_disk_cache(
    scenes: Dataset, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert_batches_after_random_changes(scenes, data, (str(tmp_path_factory.mktemp("cache")), 2_000_000))


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_same_with_a_weighted_mix(
    scenes: Dataset, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    to = tmp_path_factory.mktemp("mix")
    make_mix([scenes, scenes], [parse_weight("2.5"), parse_weight("0.5")], open_store(str(to)))
    mixed = open_dataset(str(to))
    assert order_of(mixed).most_draws > mixed.samples
    assert_batches_after_random_changes(mixed, data)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """600 samples of about 6 kB in 5 shards."""
    return write_noise(tmp_path_factory.mktemp("noise"), 5, 120, 6000)


def most_bytes(reader: Reader, dataset: Dataset, lanes: int) -> int:
    """As the docstring of pipeline.loading.loader has it; the block in use is more than these `lane_bytes`."""
    largest = int(dataset.locate(np.arange(dataset.samples)).size.max()) + 1024
    block, steps = reader.order.block * largest, (PREFETCH_BATCHES + 2) * reader.order.per_lane * largest
    return lanes * (max(reader.lane_bytes, block) + steps + block)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_held_is_bounded_and_released(noise: Dataset, data: st.DataObject) -> None:
    order = make_order(
        noise,
        24,
        data.draw(st.sampled_from([2, 6, 12, 24])),
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(0, 9)),
    )
    stop = 2 * order.steps_per_epoch
    lane_bytes = data.draw(st.sampled_from([0, 2 * order.block * 6000, 1 << 24]))
    schedule = Schedule.constant(*data.draw(workers(order.lanes)))
    reader = Reader(noise, order, schedule, 0, stop, lane_bytes)
    reader.done = done = step = reading = 0
    try:
        while step < stop:
            samples = reader.read(step, done)
            assert samples.ids.tolist() == order.step_ids(step, *schedule.at(step)).tolist()
            assert_right(noise, samples)
            # The worker of a step still to be trained may have more lanes than that of the one being read.
            lanes = max(len(reader._lanes(s)) for s in range(done, step + 1))
            assert reader.held_bytes <= most_bytes(reader, noise, lanes)
            requested = [b for blocks in reader.blocks.values() for b in blocks if b.data is not None]
            assert reader.held_bytes == sum(block.size for block in requested)
            step += 1
            done = max(done, step - 1 - PREFETCH_BATCHES)
            if data.draw(st.integers(0, 5)) == 0:
                changed = data.draw(st.integers(done, min(step + 12, stop)), label="from")
                schedule = schedule.changed(changed, data.draw(workers(order.lanes)))
                step = min(step, changed)
                reader.change(schedule, step, done)
                reading += 1
                if reading > 30:
                    return
        reader._release_until(stop)
        assert (reader.places, reader.blocks, list(reader.queue), reader.held_bytes) == ({}, {}, [], 0)
    finally:
        reader.close()


def read_steps(reader: Reader, steps: range, done: int) -> int:
    """Read these steps. Returns the bytes read for that."""
    before = reader.fetcher.storage_bytes
    for step in steps:
        assert_right(reader.dataset, reader.read(step, done))
    reader.fetcher.read_file("manifest.json").result()  # nothing is requested any more that is not there
    wait_until(lambda: not reader.fetcher.unanswered, 10)
    return (
        reader.fetcher.storage_bytes
        - before
        - len(Path(reader.dataset.store.root, "manifest.json").read_bytes())
    )


def test_nothing_is_read_again_for_lanes_that_are_kept(noise: Dataset) -> None:
    noise.locate(np.arange(noise.samples))  # all indexes: so only samples are read
    order = make_order(noise, lanes=12)
    reader = make_reader(noise, order, 0, 13, 0, 2)
    read_steps(reader, range(13), 10)
    # Rank 0 of 4 has lanes 0, 4 and 8: half of those that rank 0 of 2 has.
    reader.change(Schedule.constant(0, 2).changed(10, Worker(0, 4)), 10, 10)
    assert read_steps(reader, range(10, 13), 10) == 0
    reader.close()


def test_of_lanes_that_are_new_what_a_new_reader_would_read(noise: Dataset) -> None:
    noise.locate(np.arange(noise.samples))
    order, read = make_order(noise, lanes=12), []
    reader = make_reader(noise, order, 0, 13, 0, 4)
    read_steps(reader, range(13), 10)
    # Rank 0 of 2 has lanes 2, 6 and 10 besides: those of rank 2 of 4.
    reader.change(Schedule.constant(0, 4).changed(10, Worker(0, 2)), 10, 10)
    reader.fetcher.read_ranges = recording(reader.fetcher.read_ranges, read)
    new = make_reader(noise, order, 10, 13, 2, 4)
    own = order.step_ids(10, 2, 4)
    reader._request(10, ahead=False)
    # Nothing but the samples of the first step before it is complete.
    assert sum(r.size for r in read) <= 2 * noise.locate(own).size.sum()
    assert read_steps(reader, range(10, 13), 10) == read_steps(new, range(10, 13), 10)
    reader.close()
    new.close()


def recording(read_ranges, read):
    def record(ranges, fill_cache):
        read.extend(ranges)
        return read_ranges(ranges, fill_cache)

    return record


def test_a_change_announced_in_advance_makes_nothing_twice(scenes: Dataset) -> None:
    order = order_of(scenes)
    loader, seen = make(scenes, order, 1, 3), []
    for batch in loader.steps(0, 15):
        if batch.step == 2:
            fetcher = loader.fetcher.process.pid
            loader.change_workers(9, 0, 2)
            loader.change_workers(7, 2, 6)  # replaces that of step 9
        assert_same(batch, order, scenes, (1, 3) if batch.step < 7 else (2, 6))
        seen.append(batch.step)
        assert loader.fetcher.process.pid == fetcher if batch.step >= 2 else True
    assert seen == list(range(15))
    assert loader.decoder.calls == 15
    assert processes("pipeline.loading.fetch_process", os.getpid()) == []


def test_a_step_that_was_in_work_is_made_again_and_the_announced_change_is_void(scenes: Dataset) -> None:
    order = order_of(scenes)
    loader, seen = make(scenes, order, 1, 3), []
    for batch in loader.steps(0, 10):
        seen.append(batch.step)
        if seen == [0, 1, 2, 3]:
            fetcher = loader.fetcher.process.pid
            loader.change_workers(5, 0, 4)
            loader.change_workers(3, 1, 2)
    assert seen == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert loader.fetcher.process.pid == fetcher
    assert_same(batch, order, scenes, (1, 2))


def test_skipped_steps_are_left_out_and_behind_the_last_one_it_ends(scenes: Dataset) -> None:
    order = order_of(scenes)
    loader, seen = make(scenes, order), []
    for batch in loader.steps(0, 20):
        seen.append(batch.step)
        if batch.step == 3:
            loader.change_workers(6, 0, 2)
            loader.skip_to(6)
        assert_same(batch, order, scenes, (0, 1) if batch.step < 6 else (0, 2))
        if batch.step == 8:
            loader.skip_to(20)
    assert seen == [0, 1, 2, 3, 6, 7, 8]


def test_what_is_prepared_is_made_before_it_is_asked_for(scenes: Dataset) -> None:
    order = order_of(scenes)
    loader = make(scenes, order, 1, 2)
    loader.prepare(4, 10)
    wait_until(lambda: loader.decoder.calls == PREFETCH_BATCHES + 1, 20)
    fetcher = loader.fetcher.process.pid
    for batch in loader.steps(4, 10):
        assert_same(batch, order, scenes, (1, 2))
        assert loader.fetcher.process.pid == fetcher
    assert batch.step == 9
    assert loader.decoder.calls == 6
    loader.prepare(0, 5)
    loader.close()
    assert processes("pipeline.loading.fetch_process", os.getpid()) == []


def test_errors_of_dropped_batches_are_dropped(scenes: Dataset, tmp_path: Path) -> None:
    shutil.copytree(scenes.store.root, tmp_path / "copy")
    dataset = open_dataset(str(tmp_path / "copy"))
    order = order_of(dataset, lanes=1, block=12)
    # A shard that a later one of the first steps is the first to need.
    shards = [set(dataset.shards_of(order.step_ids(step))) for step in range(4)]
    first = next(step for step in (2, 3) if shards[step] - set.union(*shards[:step]))
    (shard, *_) = shards[first] - set.union(*shards[:first])
    path = tmp_path / "copy" / dataset.shard_name(shard)
    path.rename(tmp_path / "away")
    loader, seen = make(dataset, order), []
    for batch in loader.steps(0, 5):
        seen.append(batch.step)
        if seen == list(range(first)):
            failed = loader.prefetcher.upcoming[0].batch
            wait_until(failed.done, 20)
            assert isinstance(failed.exception(), UserError)
            (tmp_path / "away").rename(path)
            loader.change_workers(batch.step, 0, 1)
    assert seen == [*range(first), *range(first - 1, 5)]


def test_more_workers_than_lanes_are_refused_and_nothing_changes(scenes: Dataset) -> None:
    order = order_of(scenes)
    loader = make(scenes, order)
    for batch in loader.steps(0, 5):
        with pytest.raises(UserError, match="only 6 lanes"):
            loader.change_workers(2, 0, 7)
        assert_same(batch, order, scenes, (0, 1))
