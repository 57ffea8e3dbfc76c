"""Which sample is at which place of which epoch: a pure function of
(shard sizes, seed, global batch B, lanes V, block K, epoch). Nothing here depends on the number of workers.

An epoch permutes the shards, lays their samples end to end, and rotates that row. Its first ⌊N/B⌋·B places
are cut into V equal spans, the lanes. A lane is cut into blocks of K places, and each block is permuted by
itself. Step t takes the next B/V places of every lane; worker r of W owns the lanes v ≡ r (mod W).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.hashing import hash64

Ints = npt.NDArray[np.int64]

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
# Streams of the hash, so that the same (seed, epoch) gives unrelated numbers to each use.
SHARD_STREAM, BLOCK_STREAM, ROTATION_STREAM = 1, 2, 3


def default_lanes(global_batch: int) -> int:
    """V = B / 4 where 4 divides B, else B."""
    return global_batch // 4 if global_batch % 4 == 0 else global_batch


def default_block(lanes: int, mean_sample_bytes: float, chunk_bytes: int, memory_bytes: int) -> int:
    """The largest block K ≤ 128 with 2 · V · (K · mean sample bytes + chunk) within `memory_bytes`,
    the read window of the whole cluster."""
    block = int((memory_bytes / (2 * lanes) - chunk_bytes) / max(mean_sample_bytes, 1.0))
    if block < 1:
        need = 2 * lanes * (mean_sample_bytes + chunk_bytes)
        raise UserError(
            f"data.memory_gb={memory_bytes / 2**30:g} is too small for {lanes} lanes: "
            f"it takes {need / 2**30:.2f} at least"
        )
    return min(block, 128)


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a dataset under one (seed, B, V, K).

    Args:
        shard_samples: int[shards], the number of samples of each shard, in the manifest's order.
        seed: any non-negative integer.
        global_batch: B, samples a step over all workers.
        lanes: V; it divides B.
        block: K, places that are permuted together.

    Raises UserError where the numbers do not fit together.
    """

    shard_samples: Ints
    seed: int
    global_batch: int
    lanes: int
    block: int

    def __post_init__(self) -> None:
        if self.global_batch % self.lanes:
            raise UserError(
                f"the global batch ({self.global_batch}) is not divisible by the lanes ({self.lanes}): "
                f"choose lanes that divide it, {default_lanes(self.global_batch)} say"
            )
        if self.samples < self.global_batch:
            raise UserError(
                f"the dataset has {self.samples} samples, fewer than one global batch of {self.global_batch}: "
                "lower global_batch or add data"
            )

    @functools.cached_property
    def samples(self) -> int:
        """N."""
        return int(self.shard_samples.sum())

    @functools.cached_property
    def first_ids(self) -> Ints:
        """int[shards]: the id of each shard's first sample."""
        return np.cumsum(self.shard_samples) - self.shard_samples

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    @property
    def per_lane(self) -> int:
        """Samples that a step takes of each lane, B / V."""
        return self.global_batch // self.lanes

    @property
    def lane_length(self) -> int:
        return self.steps_per_epoch * self.per_lane

    def rotation(self, epoch: int) -> int:
        """Where the row begins. The golden-ratio steps make it another place in each of N epochs, spread
        evenly, so that the dropped tail moves even when there is one shard."""
        stride = max(1, round(self.samples * GOLDEN_RATIO))
        while math.gcd(stride, self.samples) != 1:
            stride += 1
        return (int(hash64(self.seed, ROTATION_STREAM)) + epoch * stride) % self.samples

    def row(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's shards in their order, and the row place where each begins: int[shards] both."""
        shards = np.arange(len(self.shard_samples))
        order = np.argsort(hash64(self.seed, SHARD_STREAM, epoch, shards), kind="stable")
        sizes = self.shard_samples[order]
        return order, np.cumsum(sizes) - sizes

    @functools.cached_property
    def _rows(self) -> "functools._lru_cache_wrapper[tuple[Ints, Ints]]":
        return functools.lru_cache(maxsize=2)(self.row)  # O(shards), once an epoch

    def lane_places(self, epoch: int, lanes: Ints, positions: Ints) -> Ints:
        """Which place of its lane is taken at each position: the permutation within blocks.

        Args:
            lanes: int[l].
            positions: int[p], ascending, each below `lane_length`.

        Returns int[l, p].
        """
        cut = self._cut(lanes)[:, None]
        block = (positions[None, :] + cut) // self.block  # [l, p]
        first = block[:, :1]
        blocks = first + np.arange(int((block[:, -1:] - first).max()) + 1)  # [l, b]: the blocks touched
        begin = np.maximum(blocks * self.block - cut, 0)
        end = np.minimum((blocks + 1) * self.block - cut, self.lane_length)
        # Rank the block's places by a hash of each; places past its end rank last and are never taken.
        offsets = np.arange(self.block)
        ranks = hash64(self.seed, BLOCK_STREAM, epoch, lanes[:, None, None], blocks[..., None], offsets)
        ranks = np.where(offsets < (end - begin)[..., None], ranks, np.uint64(2**64 - 1))
        permuted = np.argsort(ranks, axis=-1, kind="stable")  # [l, b, K]
        row = np.arange(len(lanes))[:, None]
        nth = block - first  # [l, p]: which of the touched blocks
        start = begin[row, nth]
        return start + permuted[row, nth, positions[None, :] - start]

    def _cut(self, lanes: Ints) -> Ints:
        """How much shorter the first block of each lane is. It depends on the lane, so that the lanes do not
        all need their next block at the same step."""
        return lanes * self.block // self.lanes

    def block_ends(self, lanes: Ints, positions: Ints) -> Ints:
        """Where the block that holds a position (int[l], one in each lane) ends: int[l]."""
        cut = self._cut(lanes)
        return np.minimum(((positions + cut) // self.block + 1) * self.block - cut, self.lane_length)

    def sample_ids(self, epoch: int, lanes: Ints, positions: Ints) -> Ints:
        """The sample ids at `positions` of `lanes` in an epoch: int[l, p] (see `lane_places`)."""
        places = lanes[:, None] * self.lane_length + self.lane_places(epoch, lanes, positions)
        places = (places + self.rotation(epoch)) % self.samples
        shards, begins = self._rows(epoch)
        nth = np.searchsorted(begins, places, side="right") - 1
        return self.first_ids[shards[nth]] + places - begins[nth]

    def step_ids(self, step: int, rank: int = 0, world_size: int = 1) -> Ints:
        """The sample ids that worker `rank` of `world_size` takes at optimizer step `step` (from 0, over all
        epochs), lane by lane: int[number of its lanes · B / V]."""
        epoch, step = divmod(step, self.steps_per_epoch)
        positions = np.arange(step * self.per_lane, (step + 1) * self.per_lane)
        return self.sample_ids(epoch, self.lanes_of(rank, world_size), positions).ravel()

    def lanes_of(self, rank: int, world_size: int) -> Ints:
        """The lanes of one worker. UserError where there are more workers than lanes."""
        if world_size > self.lanes:
            raise UserError(
                f"{world_size} workers for {self.lanes} lanes: use at most {self.lanes} workers, or a run with "
                "more lanes (data.lanes must divide global_batch)"
            )
        return np.arange(rank, self.lanes, world_size)

    def imbalance(self, world_size: int) -> float:
        """The largest local batch over the mean one: 1 where the world size divides the lanes."""
        return math.ceil(self.lanes / world_size) * world_size / self.lanes
