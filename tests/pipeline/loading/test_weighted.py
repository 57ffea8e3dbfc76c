"""The order of a mix: over epochs, each sample is taken as often as its weight says, at any world size."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.loading.order import Order
from pipeline.loading.weighted import Weight, epoch_length, weighted_row

WEIGHTS = [Fraction(text) for text in ("1", "0.5", "3", "1.5", "1/3", "2", "0.7", "2/3")]


@st.composite
def mixes(draw: st.DrawFn) -> Order:
    """Any order over a small mix."""
    shards: list[int] = []
    weights: list[Weight] = []
    for _ in range(draw(st.integers(1, 3))):
        own = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
        shards += own
        weights.append(Weight(len(own), draw(st.sampled_from(WEIGHTS))))
    lanes = draw(st.integers(1, 5))
    global_batch = lanes * draw(st.integers(1, 3))
    while epoch_length(np.array(shards), weights) < global_batch:
        shards[0] += 10
    block = draw(st.integers(1, 40))
    return Order(np.array(shards), draw(st.integers(0, 2**31)), global_batch, lanes, block, tuple(weights))


def times(order: Order) -> list[Fraction]:
    """The weight of each sample."""
    of_shards = [weight.times for weight in order.weights for _ in range(weight.shards)]
    return [w for w, n in zip(of_shards, order.shard_samples, strict=True) for _ in range(n)]


def taken(order: Order, epoch: int) -> np.ndarray:
    """How often an epoch takes each sample, before the last few are dropped: int64[samples]."""
    row = weighted_row(order.shard_samples, order.weights, order.seed, epoch)
    sizes = np.diff(np.r_[row.begin, row.length])
    counts = np.zeros(order.samples, np.int64)
    for shard, first, size in zip(row.shard, row.first, sizes, strict=True):
        begin = order.first_ids[shard] + first
        counts[begin : begin + size] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(mixes(), st.integers(0, 50), st.integers(1, 7))
def test_epochs_in_a_row_take_each_sample_as_often_as_its_weight(
    order: Order, epoch: int, count: int
) -> None:
    counts = sum(taken(order, e) for e in range(epoch, epoch + count))
    for weight, n in zip(times(order), counts, strict=True):
        assert math.floor(count * weight) <= n <= math.ceil(count * weight)
    period = math.lcm(*(weight.times.denominator for weight in order.weights))
    counts = sum(taken(order, e) for e in range(epoch, epoch + period))
    assert counts.tolist() == [period * weight for weight in times(order)]


@settings(max_examples=40, deadline=None)
@given(mixes(), st.integers(0, 20), st.data())
def test_steps_take_what_the_epochs_take_but_for_the_dropped_tail_at_any_world_size(
    order: Order, epoch: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, order.lanes))
    period = math.lcm(*(weight.times.denominator for weight in order.weights))
    steps = range(epoch * order.steps_per_epoch, (epoch + period) * order.steps_per_epoch)
    ids = [order.step_ids(step, rank, world_size) for step in steps for rank in range(world_size)]
    counts = np.bincount(np.concatenate(ids), minlength=order.samples)
    expected = np.array([period * weight for weight in times(order)]).astype(np.int64)
    assert (counts <= expected).all()
    assert counts.sum() == period * order.steps_per_epoch * order.global_batch
    dropped = expected.sum() - counts.sum()
    assert dropped < period * (order.global_batch + len(order.weights))


@settings(max_examples=40, deadline=None)
@given(mixes(), st.integers(0, 9))
def test_each_time_that_an_epoch_takes_a_sample_has_its_own_number(order: Order, epoch: int) -> None:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    draws = np.concatenate([order.step_draws(step) for step in steps])
    assert len(np.unique(draws)) == len(draws)
    assert draws.max() < order.most_draws
    ids = np.concatenate([order.step_ids(step) for step in steps])
    assert (draws % order.samples == ids).all()


def test_half_and_half_make_all_and_three_times_is_three_times() -> None:
    order = Order(np.array([10, 7, 5]), 0, 4, 2, 4, (Weight(2, Fraction("0.5")), Weight(1, Fraction(3))))
    first, second, third = (taken(order, epoch) for epoch in range(3))
    assert (first[:17] + second[:17] == 1).all()
    assert (first[:17] == third[:17]).all()
    assert first[:17].sum() == 8
    assert first[17:].tolist() == [3] * 5
    assert order.epoch_samples == 8 + 15


def test_the_order_of_a_mix_never_changes() -> None:
    """Runs are resumed by later versions: these numbers may not move."""
    order = Order(np.array([5, 4, 3]), 1, 4, 2, 3, (Weight(2, Fraction("0.5")), Weight(1, Fraction(2))))
    assert [order.step_draws(step).tolist() for step in range(4)] == GOLDEN


GOLDEN = [[10, 11, 23, 5], [21, 22, 7, 6], [10, 11, 0, 23], [21, 22, 2, 1]]
