"""Promises 1 to 4: the order is a pure function, the position is one number."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.loading.order import Order, default_block, default_lanes


@st.composite
def orders(draw: st.DrawFn, max_shards: int = 6) -> Order:
    """Any order over a small dataset: N, B, V, K and shards of any size that fit together."""
    lanes = draw(st.integers(1, 9))
    global_batch = lanes * draw(st.integers(1, 5))
    shards = draw(st.lists(st.integers(1, 60), min_size=1, max_size=max_shards))
    shards[0] += max(0, global_batch - sum(shards))
    return Order(np.array(shards), draw(st.integers(0, 2**31)), global_batch, lanes, draw(st.integers(1, 70)))


def epoch_ids(order: Order, epoch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    return np.concatenate([order.step_ids(step, rank, world_size) for step in steps])


@given(orders(), st.integers(0, 5))
def test_an_epoch_has_each_id_once_but_for_the_dropped_tail(order: Order, epoch: int) -> None:
    ids = epoch_ids(order, epoch)
    assert len(ids) == order.samples // order.global_batch * order.global_batch
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() >= 0
    assert ids.max() < order.samples


@given(orders(), st.integers(0, 40), st.data())
def test_the_union_over_ranks_is_the_same_at_every_world_size(
    order: Order, step: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, order.lanes))
    alone = order.step_ids(step)
    parts = [order.step_ids(step, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts)) == sorted(alone)
    # and no worker has more than one lane more than another
    assert max(map(len, parts)) - min(map(len, parts)) <= order.per_lane
    assert max(map(len, parts)) == pytest.approx(
        order.imbalance(world_size) * order.global_batch / world_size
    )


@given(orders(), st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_position_is_a_pure_function_of_the_step(order: Order, steps: list[int]) -> None:
    fresh = Order(order.shard_samples.copy(), order.seed, order.global_batch, order.lanes, order.block)
    visited = {step: order.step_ids(step).tolist() for step in steps}  # in any order, with repeats
    for step, ids in visited.items():
        assert fresh.step_ids(step).tolist() == ids


@given(orders())
def test_a_range_of_steps_is_those_steps_one_by_one(order: Order) -> None:
    lanes = np.arange(order.lanes)
    together = order.sample_ids(0, lanes, np.arange(order.lane_length))
    apart = [order.step_ids(step).reshape(order.lanes, -1) for step in range(order.steps_per_epoch)]
    assert (together == np.concatenate(apart, axis=1)).all()


@given(orders())
def test_a_block_is_a_permutation_of_neighbouring_places(order: Order) -> None:
    places = order.lane_places(0, np.arange(order.lanes), np.arange(order.lane_length))
    cuts = np.arange(order.lanes) * order.block // order.lanes
    for row, cut in zip(places, cuts, strict=True):
        borders = [0, *range(order.block - cut, order.lane_length, order.block), order.lane_length]
        for begin, end in pairwise(borders):
            assert sorted(row[begin:end]) == list(range(begin, end))


@given(st.integers(2, 400), st.integers(0, 2**31), st.data())
def test_epochs_drop_another_tail_even_with_one_shard(samples: int, seed: int, data: st.DataObject) -> None:
    global_batch = data.draw(st.integers(2, samples))
    order = Order(np.array([samples]), seed, global_batch, 1, block=16)
    epochs = min(samples, 6)
    tails = [frozenset(range(samples)) - set(epoch_ids(order, epoch).tolist()) for epoch in range(epochs)]
    if samples % global_batch:
        assert len(set(tails)) == epochs


def test_epochs_differ_also_in_the_tail_they_drop() -> None:
    order = Order(np.full(7, 100), 0, 64, 16, 32)
    epochs = [epoch_ids(order, epoch).tolist() for epoch in range(8)]
    assert len({tuple(ids) for ids in epochs}) == 8
    assert len({frozenset(range(700)) - frozenset(ids) for ids in epochs}) == 8


def test_every_sample_is_dropped_about_equally_often() -> None:
    order = Order(np.full(4, 25), 3, 30, 5, 8)  # drops 10 of 100 an epoch
    dropped = np.zeros(100)
    for epoch in range(200):
        dropped += 1 - np.bincount(epoch_ids(order, epoch), minlength=100)
    assert dropped.mean() == 20
    assert dropped.max() < 45


def test_the_order_never_changes() -> None:
    """Runs are resumed by later versions: these numbers may not move."""
    order = Order(np.array([5, 8, 7]), seed=1, global_batch=6, lanes=3, block=4)
    assert [order.step_ids(step).tolist() for step in range(4)] == GOLDEN


GOLDEN = [[0, 1, 6, 8, 12, 13], [3, 2, 7, 10, 17, 16], [4, 5, 11, 9, 15, 14], [16, 19, 9, 8, 0, 1]]


def test_shuffled_within_the_window_of_all_lanes() -> None:
    order = Order(np.full(20, 500), 0, 64, 16, 64)
    ids = epoch_ids(order, 0)
    assert abs(np.corrcoef(np.arange(len(ids)), ids)[0, 1]) < 0.1
    assert abs(np.diff(ids)).mean() > 1000


def test_refusals_say_what_to_do() -> None:
    shards = np.array([100])
    with pytest.raises(UserError, match="not divisible by the lanes"):
        Order(shards, 0, 10, 4, 8)
    with pytest.raises(UserError, match="fewer than one global batch"):
        Order(shards, 0, 101, 101, 8)
    with pytest.raises(UserError, match="use at most 5 workers"):
        Order(shards, 0, 10, 5, 8).lanes_of(0, 6)
    with pytest.raises(UserError, match="too small"):
        default_block(1024, 110_000, 1 << 20, 1 << 30)


def test_defaults() -> None:
    assert [default_lanes(b) for b in (4096, 64, 6, 7)] == [1024, 16, 6, 7]
    assert default_block(1024, 110_000, 1 << 20, 16 << 30) == 66
    assert default_block(16, 110_000, 1 << 20, 16 << 30) == 128
