"""The encoded samples of each step, read ahead block by block within a bound of bytes.

A block of a lane is one or two contiguous byte ranges, and all of its samples are taken within the next K
places of the lane: a block is read at once, and its memory goes when the last of them has been taken.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from crc32c import crc32c

from pipeline.cache import KeptPart
from pipeline.decode import Encoded
from pipeline.errors import UserError
from pipeline.fetcher import MISSING, Fetcher, Range
from pipeline.manifest import INDEX_ROW, Dataset, Located, index_name
from pipeline.order import Ints, Order
from pipeline.spent import Spent

# A gap that is read with the samples around it, rather than to ask once more; and the same for the holes that
# the first step leaves in the blocks after it, where an epoch is so long that a batch read twice does not matter.
GAP_BYTES, HOLE_BYTES, LONG_EPOCH = 64 << 10, 256 << 10, 20
RUN_BYTES = 1 << 20  # of neighbours that are read at once: small enough for several reads a batch


@dataclass(frozen=True)
class Samples:
    """The encoded samples of a worker's part of a step, n of them."""

    ids: Ints
    located: Located
    encoded: list[Encoded]
    changed: list[int]  # positions of those whose bytes are not what the index says
    spent: Spent  # on storage and reading; not counted by `read_samples`


@dataclass
class Block:
    """Samples that are read together: what is left of a lane's block, or all that the first step takes."""

    step: int  # the first that needs it
    located: Located
    ranges: list[Range]
    begins: list[int]  # where each sample begins in the ranges laid end to end,
    ends: list[int]  # and where it ends
    left: int  # samples not taken yet
    data: "Future[memoryview]" = field(init=False)

    @property
    def size(self) -> int:
        return sum(r.size for r in self.ranges)

    def sample(self, i: int) -> memoryview:
        return self.data.result()[self.begins[i] : self.ends[i]]


class Reader:
    """The samples of one worker from step `start` to `stop`, in order. For one thread.

    Args:
        bound_bytes: how much may be held or under way beyond what the current step needs.
        kept: the kept part of the dataset, if there is one.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        rank: int,
        world_size: int,
        start: int,
        stop: int,
        bound_bytes: int,
        kept: KeptPart | None = None,
    ) -> None:
        self.dataset, self.order, self.kept = dataset, order, kept
        self.rank, self.world_size = rank, world_size
        self.start, self.stop, self.bound_bytes = start, stop, bound_bytes
        self.lanes = order.lanes_of(rank, world_size)
        self.fetcher = Fetcher(dataset.shard_store.url, dataset.store.url, kept, spare_bytes=bound_bytes // 8)
        self.first_chunks = np.zeros_like(dataset.shard_bytes)
        if kept:
            chunks = -(-dataset.shard_bytes // kept.chunk_bytes)
            self.first_chunks = np.cumsum(chunks) - chunks
        self.planned = start  # the next step to plan
        self.reached = np.zeros_like(
            self.lanes
        )  # in each lane, the epoch's first position that is in no block yet
        self.queue: deque[Block] = deque()  # planned and not asked for
        self.held_bytes = 0  # of blocks that are asked for and not used up
        self.places: dict[int, tuple[Block, int]] = {}  # epoch · N + sample id → its block, and where in it
        self.indexes: dict[int, Future[memoryview]] = {}  # of shards, under way
        self.waited_s = 0.0  # for storage, so far

    def read(self, step: int) -> Samples:
        """The samples of a step, the one after the last. UserError where storage refuses for good."""
        begin, waited_s = time.perf_counter(), self.waited_s
        # Nothing else is read before the first step has come: the device waits for it.
        self._ask(step, ahead=step > self.start)
        ids = self.order.step_ids(step, self.rank, self.world_size)
        first = step // self.order.steps_per_epoch * self.order.samples
        taken = [self.places.pop(first + i) for i in ids.tolist()]
        asked = time.perf_counter()
        encoded: list[Encoded] = [block.sample(i) for block, i in taken]
        self.waited_s += time.perf_counter() - asked
        located = Located(np.empty(len(ids), np.int64), np.empty(len(ids), INDEX_ROW))
        at = 0
        for _, run in itertools.groupby(taken, lambda block_and_place: id(block_and_place[0])):
            blocks, places = zip(*run, strict=True)
            block, here, there = blocks[0], slice(at, at + len(places)), list(places)
            located.shard[here], located.row[here] = block.located.shard[there], block.located.row[there]
            at += len(places)
            block.left -= len(places)
            if not block.left:
                self.held_bytes -= block.size
        self._ask(step, ahead=True)
        changed = self._check(located, encoded)
        storage_s = self.waited_s - waited_s
        spent = Spent(storage=storage_s, read=time.perf_counter() - begin - storage_s)
        return Samples(ids, located, encoded, changed, spent)

    def _ask(self, step: int, ahead: bool) -> None:
        """Ask the fetcher for what `step` needs, and for what comes after as far as the bound allows."""
        while self.queue or self.planned < (self.stop if ahead else step + 1):
            if not self.queue:
                if not self._plan(self.planned, wait=self.planned <= step):
                    return
                self.planned += 1
                continue
            block = self.queue[0]
            if block.step > step and self.held_bytes + block.size > self.bound_bytes:
                return
            block.data = self.fetcher.ranges(block.ranges, keep=block.step > self.start)
            self.held_bytes += block.size
            self.queue.popleft()

    def _plan(self, step: int, wait: bool) -> bool:
        """Queue the blocks that `step` is the first to need. False if indexes are missing, and not to be
        waited for."""
        order = self.order
        epoch, within = divmod(step, order.steps_per_epoch)
        end = (within + 1) * order.per_lane
        reached = self.reached.copy() if within else np.zeros_like(self.reached)
        groups: list[Ints] = []  # sample ids that are read together
        if step == self.start:
            # Of the first step its samples alone, so that it comes soon; of their blocks, the rest later.
            groups.append(order.step_ids(step, self.rank, self.world_size))
            reached = np.full_like(reached, end)
        while (behind := np.flatnonzero(reached < end)).size:
            ends = order.block_ends(self.lanes[behind], reached[behind])
            for lane, a, b in zip(self.lanes[behind], reached[behind].tolist(), ends.tolist(), strict=True):
                groups.append(order.sample_ids(epoch, np.array([lane]), np.arange(a, b))[0])
            reached[behind] = ends
        if not self._indexes_ready(groups, wait):
            return False
        self.reached = reached
        if not groups:
            return True
        groups = [np.sort(ids) for ids in groups]
        # All of them at once: should there be no memory for so many indexes, each is still taken in only once.
        together = self.dataset.locate(np.concatenate(groups), self._index)
        ends = np.cumsum([len(ids) for ids in groups])
        for ids, end in zip(groups, ends.tolist(), strict=True):
            here = slice(end - len(ids), end)
            block = self._block(step, Located(together.shard[here].copy(), together.row[here].copy()))
            self.queue.append(block)
            first = epoch * order.samples
            self.places |= {first + sample: (block, i) for i, sample in enumerate(ids.tolist())}
        return True

    def _indexes_ready(self, groups: list[Ints], wait: bool) -> bool:
        shards = self.dataset.shards_of(np.concatenate(groups)) if groups else []
        for shard in shards:
            if not self.dataset.has_index(shard):
                self._ask_index(shard)
        return wait or all(self.indexes[shard].done() for shard in shards if shard in self.indexes)

    def _ask_index(self, shard: int) -> None:
        if shard not in self.indexes:
            self.indexes[shard] = self.fetcher.whole(index_name(self.dataset.shard_name(shard)))

    def _index(self, shard: int) -> memoryview:
        self._ask_index(shard)  # as a rule it is under way; a picture made meanwhile may have driven it out
        asked = time.perf_counter()
        data = self.indexes.pop(shard).result()
        self.waited_s += time.perf_counter() - asked
        return data

    def _block(self, step: int, located: Located) -> Block:
        """The block of these samples, in the order in which they lie in the shards."""
        shard, begin, size = located.shard, located.offset, located.size
        gap = begin[1:] - (begin + size)[:-1]
        # What the first step takes lies here and there: twice its own bytes are the most that is read for it.
        most: int | Ints = HOLE_BYTES if self.order.steps_per_epoch >= LONG_EPOCH else GAP_BYTES
        if step == self.start:
            most = size[:-1]
        cuts = np.flatnonzero((np.diff(shard) != 0) | (gap > most) | (gap < 0)) + 1
        firsts, lasts = np.r_[0, cuts], np.r_[cuts, len(shard)] - 1
        ranges, begins, position = [], [], 0
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            s, start = int(shard[first]), int(begin[first])
            stop = int(begin[last] + size[last])
            ranges.append(
                Range(
                    self.dataset.shard_name(s),
                    start,
                    stop - start,
                    s,
                    int(self.dataset.shard_bytes[s]),
                    int(self.first_chunks[s]),
                )
            )
            begins += (begin[first : last + 1] - start + position).tolist()
            position += stop - start
        ends = (np.array(begins) + size).tolist()
        return Block(step, located, ranges, begins, ends, len(shard))

    def _check(self, located: Located, encoded: list[Encoded]) -> list[int]:
        """Compare checksums. What differs is read again, past the kept part; positions of what still differs."""
        changed: list[int] = []
        if not self.dataset.manifest.checksums:
            return changed
        for i, expected in enumerate(located.crc32c.tolist()):
            if crc32c(encoded[i]) == expected:
                continue
            shard, offset, size = (int(c[i]) for c in (located.shard, located.offset, located.size))
            if self.kept:
                for chunk in range(
                    offset // self.kept.chunk_bytes, (offset + size - 1) // self.kept.chunk_bytes + 1
                ):
                    self.kept.forget(shard, chunk)
            encoded[i] = _read(self.dataset, located, i)
            if crc32c(encoded[i]) != expected:
                changed.append(i)
        return changed

    def close(self) -> None:
        self.fetcher.close()


def _read(dataset: Dataset, located: Located, i: int) -> bytes:
    """The bytes of one sample, read by this process itself."""
    name = dataset.shard_name(int(located.shard[i]))
    try:
        return dataset.shard_store.read_range(name, int(located.offset[i]), int(located.size[i]))
    except FileNotFoundError:
        raise UserError(f"{dataset.shard_store.describe(name)} {MISSING}") from None


def _neighbours(located: Located) -> Iterator[range]:
    """Rows of samples that lie one after the other in a shard, at most RUN_BYTES of them together."""
    ends = located.offset + located.size
    first = 0
    for i in range(1, len(ends) + 1):
        if i < len(ends) and located.shard[i] == located.shard[first]:
            gap = located.offset[i] - ends[i - 1]
            if 0 <= gap <= GAP_BYTES and ends[i] - located.offset[first] <= RUN_BYTES:
                continue
        yield range(first, i)
        first = i


def _read_neighbours(dataset: Dataset, located: Located, rows: range) -> list[Encoded]:
    start, end = int(located.offset[rows[0]]), int(located.offset[rows[-1]] + located.size[rows[-1]])
    name = dataset.shard_name(int(located.shard[rows[0]]))
    try:
        data = memoryview(dataset.shard_store.read_range(name, start, end - start))
    except FileNotFoundError:
        raise UserError(f"{dataset.shard_store.describe(name)} {MISSING}") from None
    spans = ((int(located.offset[i]) - start, int(located.size[i])) for i in rows)
    return [data[offset : offset + size] for offset, size in spans]


def read_samples(dataset: Dataset, ids: Ints) -> Samples:
    """Samples here and there (int[n]), in one range where they are neighbours: for pictures and evaluations."""
    located = dataset.locate(ids)
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(lambda rows: _read_neighbours(dataset, located, rows), _neighbours(located))
        encoded = [data for part in parts for data in part]
    expected = located.crc32c.tolist() if dataset.manifest.checksums else []
    changed = [i for i, crc in enumerate(expected) if crc32c(encoded[i]) != crc]
    return Samples(np.asarray(ids, np.int64), located, encoded, changed, Spent())
