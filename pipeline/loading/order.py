"""The data order: which samples each optimizer step trains on.

The order is a pure function of the step. It depends on the shard sizes, the seed, B, V and K only: not on the number
of workers, on timing, on the disk cache or on what ran before. So resuming takes the step number and nothing else, and
a run may continue with another world size.

    N   samples in the dataset; a sample's id is its position in the manifest's order, 0 to N − 1
    B   global batch: samples per step over all workers
    V   lanes: streams that are read at the same time; V divides B
    K   block: consecutive samples of a lane that are shuffled among themselves

Epoch e is made in four steps, here with four shards, N = 18, B = 4, V = 2, K = 4:

    1. shuffle the shards     CCCCC AAAA DDD BBBBBB            their samples end to end
    2. rotate                 CC AAAA DDD BBBBBB CCC           by a hash of the seed, and further in each epoch
    3. cut into V lanes       lane 0: CCAAAADD  lane 1: DBBBBBBC  the last N mod B samples (here CC) are dropped
    4. shuffle each block     lane 0: CCAA|AADD  lane 1: DB|BBBB|BC   K samples; the first block of a lane is shorter

Step t takes the next B / V samples of every lane. Worker r of W owns the lanes v with v mod W = r.

Why it is like this:

- A block is a contiguous byte range of one or two shards. So reads are large, and each byte is read once per epoch.
- An epoch is shuffled through a window of V · K samples from about V places of an already shuffled dataset.
- The rotation changes which samples are dropped and where lanes begin, even with a single shard.
- The first block of lane v is shortened by an amount that depends on v, so that the lanes do not all need their next
  block at the same step.
- In a mix with weights, an epoch takes some samples several times, or not at all: `pipeline.loading.weighted` says which. Step 1
  then shuffles pieces of shards, N is the number of samples that an epoch takes, and "once" becomes: over epochs in a row, each sample
  is taken as often as its weight says, but for what is dropped. If an epoch takes a sample several times, each time has a number
  of its own (`draws`), so that crops and masks differ.
- All randomness is a hash of counters (`pipeline.hashing`), so any step is computed directly: O(shards) once per epoch,
  O(log shards) per sample after that.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.arrays import Ints
from pipeline.errors import UserError
from pipeline.hashing import hash64
from pipeline.loading.weighted import Row, Weight, epoch_length, weighted_row

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
# Each use of the hash has its own stream number, so that the same (seed, epoch) gives unrelated values.
SHARD_STREAM, BLOCK_STREAM, ROTATION_STREAM = 1, 2, 3  # and those of `pipeline.loading.weighted`


def default_lanes(global_batch: int) -> int:
    """V = B / 4 where 4 divides B, else B."""
    return global_batch // 4 if global_batch % 4 == 0 else global_batch


def default_block(lanes: int, mean_sample_bytes: float, chunk_bytes: int, memory_bytes: int) -> int:
    """The largest block K ≤ 128 whose read-ahead memory, 2 · V · (K · mean sample bytes + chunk), fits into
    `memory_bytes` over all workers. UserError if not even K = 1 does."""
    block = int((memory_bytes / (2 * lanes) - chunk_bytes) / max(mean_sample_bytes, 1.0))
    if block < 1:
        need = 2 * lanes * (mean_sample_bytes + chunk_bytes)
        raise UserError(
            f"data.memory_gb={memory_bytes / 2**30:g} is too small for {lanes} lanes: set it to at least "
            f"{need / 2**30:.2f}, or use fewer lanes (data.lanes)"
        )
    return min(block, 128)


@dataclass(frozen=True, eq=False)
class Order:
    """The data order for one (seed, B, V, K).

    Args:
        shard_samples: int64[shards], number of samples in each shard, in the manifest's order.
        seed: any non-negative integer.
        global_batch: B, samples per step over all workers.
        lanes: V; must divide B.
        block: K, samples of a lane that are shuffled together.
        weights: of all shards in turn, if samples are not all taken once per epoch.

    Raises UserError if V does not divide B, or the dataset has fewer than B samples.
    """

    shard_samples: Ints
    seed: int
    global_batch: int
    lanes: int
    block: int
    weights: tuple[Weight, ...] = ()

    def __post_init__(self) -> None:
        if self.global_batch % self.lanes:
            raise UserError(
                f"the global batch ({self.global_batch}) is not divisible by the lanes ({self.lanes}): "
                f"choose a number of lanes that divides it, for example {default_lanes(self.global_batch)}"
            )
        if self.epoch_samples < self.global_batch:
            what = "an epoch" if self.weights else "the dataset"
            raise UserError(
                f"{what} has {self.epoch_samples} samples, fewer than one global batch of {self.global_batch}: "
                "lower global_batch or use a larger dataset"
            )

    @functools.cached_property
    def samples(self) -> int:
        """Samples in the dataset."""
        return int(self.shard_samples.sum())

    @functools.cached_property
    def epoch_samples(self) -> int:
        """N: the samples of the dataset, or the fewest that an epoch of a mix takes."""
        return epoch_length(self.shard_samples, self.weights) if self.weights else self.samples

    @functools.cached_property
    def most_draws(self) -> int:
        """Draws of an epoch are less than this number."""
        visits = max((math.ceil(weight.times) + 1 for weight in self.weights), default=1)
        return visits * self.samples

    @functools.cached_property
    def first_ids(self) -> Ints:
        """The id of each shard's first sample: int64[shards]."""
        return np.cumsum(self.shard_samples) - self.shard_samples

    @property
    def steps_per_epoch(self) -> int:
        """⌊N / B⌋."""
        return self.epoch_samples // self.global_batch

    @property
    def per_lane(self) -> int:
        """Samples per step and lane, B / V."""
        return self.global_batch // self.lanes

    @property
    def lane_length(self) -> int:
        """Samples of a lane per epoch."""
        return self.steps_per_epoch * self.per_lane

    def rotation(self, epoch: int) -> int:
        """How far the epoch's row of samples is rotated, 0 to N − 1.

        Steps of N times the golden ratio give a different rotation in each of N epochs, evenly spread, so that the
        dropped tail moves even when there is one shard.
        """
        length = epoch_length(self.shard_samples, self.weights, epoch) if self.weights else self.samples
        stride = max(1, round(length * GOLDEN_RATIO))
        while math.gcd(stride, length) != 1:
            stride += 1
        return (int(hash64(self.seed, ROTATION_STREAM)) + epoch * stride) % length

    def row(self, epoch: int) -> Row:
        """The epoch's samples before rotation: the shards in their shuffled order, or pieces of them in a mix."""
        if self.weights:
            return weighted_row(self.shard_samples, self.weights, self.seed, epoch)
        shards = np.arange(len(self.shard_samples))
        order = np.argsort(hash64(self.seed, SHARD_STREAM, epoch, shards), kind="stable")
        sizes = self.shard_samples[order]
        zeros = np.zeros_like(order)
        return Row(order, zeros, np.cumsum(sizes) - sizes, zeros, self.samples)

    @functools.cached_property
    def _rows(self) -> "functools._lru_cache_wrapper[Row]":
        return functools.lru_cache(maxsize=2)(self.row)  # O(shards), once per epoch

    def lane_places(self, epoch: int, lanes: Ints, positions: Ints) -> Ints:
        """The place in its lane of the sample at each position: the shuffle within blocks.

        A position counts the samples of a lane in the order in which steps take them; a place counts them in the order
        in which they are stored. Both go from 0 to `lane_length` − 1.

        Args:
            lanes: int64[l].
            positions: int64[p], ascending.

        Returns int64[l, p].
        """
        cut = self._cut(lanes)[:, None]
        block = (positions[None, :] + cut) // self.block  # [l, p]
        first = block[:, :1]
        blocks = first + np.arange(int((block[:, -1:] - first).max()) + 1)  # [l, b]: the blocks needed
        begin = np.maximum(blocks * self.block - cut, 0)
        end = np.minimum((blocks + 1) * self.block - cut, self.lane_length)
        # Sort the block's places by a hash of each. Places past its end come last and are never taken.
        offsets = np.arange(self.block)
        ranks = hash64(self.seed, BLOCK_STREAM, epoch, lanes[:, None, None], blocks[..., None], offsets)
        ranks = np.where(offsets < (end - begin)[..., None], ranks, np.uint64(2**64 - 1))
        permuted = np.argsort(ranks, axis=-1, kind="stable")  # [l, b, K]
        row = np.arange(len(lanes))[:, None]
        nth = block - first  # [l, p]: index into `blocks`
        start = begin[row, nth]
        return start + permuted[row, nth, positions[None, :] - start]

    def _cut(self, lanes: Ints) -> Ints:
        """By how many samples the first block of each lane is shortened, so that the lanes do not all need their next
        block at the same step: int64[l]."""
        return lanes * self.block // self.lanes

    def block_ends(self, lanes: Ints, positions: Ints) -> Ints:
        """The end (exclusive) of the block that contains a position, for one position per lane: int64[l]."""
        cut = self._cut(lanes)
        return np.minimum(((positions + cut) // self.block + 1) * self.block - cut, self.lane_length)

    def sample_ids(self, epoch: int, lanes: Ints, positions: Ints) -> Ints:
        """The ids of the samples at `positions` of `lanes` in an epoch, see `lane_places`: int64[l, p]."""
        return self.draws(epoch, lanes, positions) % self.samples

    def draws(self, epoch: int, lanes: Ints, positions: Ints) -> Ints:
        """Like `sample_ids`, but with a number of its own for each time that the epoch takes a sample: id + k · samples, where
        k is 0 except in a mix, see `Row.visit`. No two of an epoch are equal."""
        row = self._rows(epoch)
        places = lanes[:, None] * self.lane_length + self.lane_places(epoch, lanes, positions)
        places = (places + self.rotation(epoch)) % row.length
        nth = np.searchsorted(row.begin, places, side="right") - 1
        ids = self.first_ids[row.shard[nth]] + row.first[nth] + places - row.begin[nth]
        return ids + row.visit[nth] * self.samples

    def step_ids(self, step: int, rank: int = 0, world_size: int = 1) -> Ints:
        """The ids of the samples that worker `rank` of `world_size` trains on at optimizer step `step` (counted from 0
        over all epochs), lane by lane: int64[number of its lanes · B / V]."""
        return self.step_draws(step, rank, world_size) % self.samples

    def step_draws(self, step: int, rank: int = 0, world_size: int = 1) -> Ints:
        """Like `step_ids`, but with the numbers of `draws`."""
        epoch, step = divmod(step, self.steps_per_epoch)
        positions = np.arange(step * self.per_lane, (step + 1) * self.per_lane)
        return self.draws(epoch, self.lanes_of(rank, world_size), positions).ravel()

    def lanes_of(self, rank: int, world_size: int) -> Ints:
        """The lanes of one worker: int64[l]. UserError if there are more workers than lanes."""
        if world_size > self.lanes:
            raise UserError(
                f"{world_size} workers but only {self.lanes} lanes: use at most {self.lanes} workers, or start a run "
                "with more lanes (data.lanes must divide global_batch)"
            )
        return np.arange(rank, self.lanes, world_size)

    def imbalance(self, world_size: int) -> float:
        """The largest local batch divided by the mean one; 1 if the world size divides the lanes."""
        return math.ceil(self.lanes / world_size) * world_size / self.lanes


class Worker(NamedTuple):
    rank: int
    world_size: int


@dataclass(frozen=True)
class Schedule:
    """For each change the first step of the worker that it makes this one, in ascending order. The first of these steps is 0."""

    changes: tuple[tuple[int, Worker], ...]

    @classmethod
    def constant(cls, rank: int, world_size: int) -> "Schedule":
        return cls(((0, Worker(rank, world_size)),))

    def at(self, step: int) -> Worker:
        return next(worker for first, worker in reversed(self.changes) if first <= step)

    def changed(self, step: int, worker: Worker) -> "Schedule":
        """With another worker from `step` on. It replaces all changes at or after `step`."""
        step = max(step, 0)
        return Schedule((*(change for change in self.changes if change[0] < step), (step, worker)))

    def first_difference(self, other: "Schedule") -> int | None:
        """The first step at which the two differ; None if there is none."""
        steps = sorted({step for step, _ in self.changes + other.changes})
        return next((step for step in steps if self.at(step) != other.at(step)), None)
