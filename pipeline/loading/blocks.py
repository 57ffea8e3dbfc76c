"""Samples that are read together: a block of a lane, or the samples of one step."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.arrays import Ints
from pipeline.dataset.dataset import SMALL_GAP_BYTES, Dataset, Located
from pipeline.loading.fetch_client import Range
from pipeline.loading.order import Order

# A gap between two samples of up to this size is read with them rather than making another request.
GAP_BYTES = 64 << 10
# The same for samples that the first step has read already, in epochs of at least LONG_EPOCH steps: there, reading one
# batch twice does not matter.
HOLE_BYTES, LONG_EPOCH = 256 << 10, 20


class Span(NamedTuple):
    """Samples that are read together: of each lane those at positions `first` to `stop` − 1, counted over all epochs."""

    lanes: Ints  # one lane for a block; several for the first step of lanes that are new
    first: int
    stop: int
    new: bool  # whether the lanes are new: these are the samples of a single step


@dataclass(eq=False)
class Block:
    """The bytes of a span, and where its samples are in them."""

    span: Span
    step: int  # the first step that needs it
    last_step: int  # and the last
    keys: list[int]  # of its samples in `Reader.places`
    located: Located  # its samples
    ranges: list[Range]  # to read
    begins: list[int]  # first byte of each sample in the ranges laid end to end
    ends: list[int]  # and the byte after its last
    size: int  # bytes of the ranges
    data: "Future[memoryview] | None" = None  # set when the block is requested

    def sample(self, i: int) -> memoryview:
        assert self.data is not None
        return self.data.result()[self.begins[i] : self.ends[i]]

    @property
    def failed(self) -> bool:
        return self.data is not None and self.data.done() and self.data.exception() is not None


def make_block(
    dataset: Dataset, order: Order, span: Span, keys: list[int], first_chunks: Ints, located: Located
) -> Block:
    """The block of a span, whose samples are sorted by their position in the dataset."""
    shard, begin, size = located.shard, located.offset, located.size
    if span.new:
        # The samples of one step are scattered. Read at most twice their own bytes.
        firsts, lasts = _runs(located, size[:-1])
    else:
        firsts, lasts = _runs(located, HOLE_BYTES if order.steps_per_epoch >= LONG_EPOCH else GAP_BYTES)
        # So are those of a view that has few samples of each shard. Here single gaps may be larger.
        small = max(SMALL_GAP_BYTES, int(size.mean()))
        if (begin[lasts] + size[lasts] - begin[firsts]).sum() > size.sum() + small * len(size):
            firsts, lasts = _runs(located, small)
    ranges, begins, position = [], [], 0
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        s, start = int(shard[first]), int(begin[first])
        stop = int(begin[last] + size[last])
        ranges.append(
            Range(
                dataset.shard_name(s),
                start,
                stop - start,
                s,
                int(dataset.shard_bytes[s]),
                int(first_chunks[s]),
            )
        )
        begins += (begin[first : last + 1] - start + position).tolist()
        position += stop - start
    ends = (np.array(begins) + size).tolist()
    step, last_step = span.first // order.per_lane, (span.stop - 1) // order.per_lane
    return Block(span, step, last_step, keys, located, ranges, begins, ends, position)


def _runs(located: Located, max_gap: int | Ints) -> tuple[Ints, Ints]:
    """The first and the last position of each run of samples that are read together: those of one shard with at most
    `max_gap` bytes between two."""
    gap = located.offset[1:] - (located.offset + located.size)[:-1]
    cuts = np.flatnonzero((np.diff(located.shard) != 0) | (gap > max_gap) | (gap < 0)) + 1
    return np.r_[0, cuts], np.r_[cuts, len(located.shard)] - 1
