"""Read-ahead: the encoded samples of each step, read from storage block by block before they are needed.

A block of a lane (`pipeline.loading.order`) is one or two contiguous byte ranges of shards, and all of its samples are
used within the next K samples of the lane. So a block is read as a whole, and its memory is freed when the last of its
samples has been used. For each step, in order:

1. Plan: find the blocks that the step is the first to need, read the indexes of their shards, and queue the blocks.
2. Request queued blocks from the fetch process: those that the current step needs at once, later ones as long as at
   most `readahead_bytes` are requested and not used up.
3. Wait for the step's samples, and check their crc32c against the index. A sample that differs is read once more,
   directly from storage; if it still differs, it is a bad sample.

The first step of a run is different: only its own samples are read, not their whole blocks, so that training can start
soon. The rest of those blocks is read after it.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from crc32c import crc32c

from pipeline.arrays import Ints
from pipeline.dataset.dataset import SMALL_GAP_BYTES, Dataset, Located
from pipeline.dataset.manifest import index_name
from pipeline.decode.decoder import Encoded
from pipeline.errors import UserError
from pipeline.loading.disk_cache import DiskCache
from pipeline.loading.fetch_client import MISSING, Fetcher, Range
from pipeline.loading.order import Order
from pipeline.stage_times import StageTimes

# A gap between two samples of up to this size is read with them rather than making another request.
GAP_BYTES = 64 << 10
# The same for samples that the first step has read already, in epochs of at least LONG_EPOCH steps: there, reading one
# batch twice does not matter.
HOLE_BYTES, LONG_EPOCH = 256 << 10, 20
RUN_BYTES = 1 << 20  # largest read of `read_samples`: small enough for several reads per batch
# Reads of `read_samples`, which evaluations call from about two threads at a time. The threads mostly wait.
READ_POOL = ThreadPoolExecutor(32, "read-samples")


@dataclass(frozen=True)
class Samples:
    """n encoded samples."""

    ids: Ints  # int64[n]
    located: Located  # where they are stored, labels and sizes
    encoded: list[Encoded]  # n image files
    changed: list[int]  # positions of samples whose bytes do not match the index's crc32c
    stage_times: StageTimes  # of storage and reading; zero from `read_samples`
    draws: Ints  # int64[n], see `Order.draws`; `ids` for evaluations


@dataclass
class Block:
    """Samples that are read together: a block of a lane, or all samples of the first step."""

    step: int  # the first step that needs it
    located: Located  # its samples
    ranges: list[Range]  # what is read
    begins: list[int]  # first byte of each sample in the ranges laid end to end
    ends: list[int]  # and the byte after its last
    unused: int  # samples that no step has used yet
    data: "Future[memoryview]" = field(init=False)  # set when the block is requested

    @property
    def size(self) -> int:
        return sum(r.size for r in self.ranges)

    def sample(self, i: int) -> memoryview:
        return self.data.result()[self.begins[i] : self.ends[i]]


class Reader:
    """Reads the samples of one worker for steps `start` to `stop` − 1, in order. Not thread-safe.

    Args:
        rank, world_size: this worker, and the number of workers.
        readahead_bytes: how much may be requested or held beyond what the current step needs.
        disk_cache: the node's disk cache, if there is one.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        rank: int,
        world_size: int,
        start: int,
        stop: int,
        readahead_bytes: int,
        disk_cache: DiskCache | None = None,
    ) -> None:
        self.dataset, self.order, self.disk_cache = dataset, order, disk_cache
        self.rank, self.world_size = rank, world_size
        self.start, self.stop, self.readahead_bytes = start, stop, readahead_bytes
        self.lanes = order.lanes_of(rank, world_size)
        self.fetcher = Fetcher(
            dataset.shard_store.url, dataset.store.url, disk_cache, spare_bytes=readahead_bytes // 8
        )
        self.first_chunks = np.zeros_like(dataset.shard_bytes)
        if disk_cache:
            chunks = -(-dataset.shard_bytes // disk_cache.chunk_bytes)
            self.first_chunks = np.cumsum(chunks) - chunks
        self.next_step = start  # to plan
        self.planned_until = np.zeros_like(
            self.lanes
        )  # of each lane: the epoch's first position in no block yet
        self.queue: deque[Block] = deque()  # planned but not requested
        self.held_bytes = 0  # of blocks that are requested and not used up
        self.places: dict[
            int, tuple[Block, int]
        ] = {}  # epoch · most_draws + draw → its block, and its position in it
        self.indexes: dict[int, Future[memoryview]] = {}  # shard → its index, requested but not used yet
        self.waited_s = 0.0  # for storage, in all

    def read(self, step: int) -> Samples:
        """The samples of a step. Call it for each step in turn. UserError if storage refuses for good."""
        begin, waited_s = time.perf_counter(), self.waited_s
        # Read nothing else before the first step is complete: the device waits for it.
        self._request(step, ahead=step > self.start)
        draws = self.order.step_draws(step, self.rank, self.world_size)
        ids = draws % self.order.samples
        first = step // self.order.steps_per_epoch * self.order.most_draws
        taken = [self.places.pop(first + draw) for draw in draws.tolist()]
        wait_begin = time.perf_counter()
        encoded: list[Encoded] = [block.sample(i) for block, i in taken]
        self.waited_s += time.perf_counter() - wait_begin
        located = Located(np.empty(len(ids), np.int64), np.empty(len(ids), self.dataset.row_type))
        at = 0
        for _, run in itertools.groupby(taken, lambda block_and_place: id(block_and_place[0])):
            blocks, places = zip(*run, strict=True)
            block, here, there = blocks[0], slice(at, at + len(places)), list(places)
            located.shard[here], located.row[here] = block.located.shard[there], block.located.row[there]
            at += len(places)
            block.unused -= len(places)
            if not block.unused:
                self.held_bytes -= block.size
        self._request(step, ahead=True)
        changed = self._check(located, encoded)
        storage_s = self.waited_s - waited_s
        stage_times = StageTimes(storage=storage_s, read=time.perf_counter() - begin - storage_s)
        return Samples(ids, located, encoded, changed, stage_times, draws)

    def _request(self, step: int, ahead: bool) -> None:
        """Request the blocks that `step` needs and, with `ahead`, later ones as far as `readahead_bytes` allows."""
        while self.queue or self.next_step < (self.stop if ahead else step + 1):
            if not self.queue:
                if not self._plan(self.next_step, wait=self.next_step <= step):
                    return
                self.next_step += 1
                continue
            block = self.queue[0]
            if block.step > step and self.held_bytes + block.size > self.readahead_bytes:
                return
            block.data = self.fetcher.read_ranges(block.ranges, fill_cache=block.step > self.start)
            self.held_bytes += block.size
            self.queue.popleft()

    def _plan(self, step: int, wait: bool) -> bool:
        """Queue the blocks that `step` is the first to need. Returns False, and queues nothing, if their indexes have not
        arrived yet and `wait` is False."""
        order = self.order
        epoch, within = divmod(step, order.steps_per_epoch)
        end = (within + 1) * order.per_lane
        until = self.planned_until.copy() if within else np.zeros_like(self.planned_until)
        groups: list[Ints] = []  # draws that are read together
        if step == self.start:
            # Of the first step only its own samples, so that it is complete soon; the rest of their blocks later.
            groups.append(order.step_draws(step, self.rank, self.world_size))
            until = np.full_like(until, end)
        while (behind := np.flatnonzero(until < end)).size:
            ends = order.block_ends(self.lanes[behind], until[behind])
            for lane, a, b in zip(self.lanes[behind], until[behind].tolist(), ends.tolist(), strict=True):
                groups.append(order.draws(epoch, np.array([lane]), np.arange(a, b))[0])
            until[behind] = ends
        if not self._indexes_ready(groups, wait):
            return False
        self.planned_until = until
        if not groups:
            return True
        groups = [draws[np.argsort(draws % order.samples, kind="stable")] for draws in groups]
        # Look up all of them in one call: then each index is parsed only once, even if not all fit into memory.
        together = self.dataset.locate(np.concatenate(groups) % order.samples, self._index)
        ends = np.cumsum([len(draws) for draws in groups])
        for draws, end in zip(groups, ends.tolist(), strict=True):
            here = slice(end - len(draws), end)
            block = self._block(step, Located(together.shard[here].copy(), together.row[here].copy()))
            self.queue.append(block)
            first = epoch * order.most_draws
            self.places |= {first + draw: (block, i) for i, draw in enumerate(draws.tolist())}
        return True

    def _indexes_ready(self, groups: list[Ints], wait: bool) -> bool:
        shards = self.dataset.shards_of(np.concatenate(groups) % self.order.samples) if groups else []
        for shard in shards:
            if not self.dataset.has_index(shard):
                self._request_index(shard)
        return wait or all(self.indexes[shard].done() for shard in shards if shard in self.indexes)

    def _request_index(self, shard: int) -> None:
        if shard not in self.indexes:
            self.indexes[shard] = self.fetcher.read_file(index_name(self.dataset.shard_name(shard)))

    def _index(self, shard: int) -> memoryview:
        # It is usually requested already. But other users of the dataset may have evicted it from memory since then.
        self._request_index(shard)
        wait_begin = time.perf_counter()
        data = self.indexes.pop(shard).result()
        self.waited_s += time.perf_counter() - wait_begin
        return data

    def _block(self, step: int, located: Located) -> Block:
        """A block of these samples, which are sorted by their position in the dataset."""
        shard, begin, size = located.shard, located.offset, located.size
        if step == self.start:
            # The samples of the first step are scattered. Read at most twice their own bytes.
            firsts, lasts = _runs(located, size[:-1])
        else:
            firsts, lasts = _runs(
                located, HOLE_BYTES if self.order.steps_per_epoch >= LONG_EPOCH else GAP_BYTES
            )
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
        """Compare crc32c with the index. Samples that differ are read again from storage, and their chunks are removed
        from the disk cache. Returns the positions of samples that still differ."""
        changed: list[int] = []
        if not self.dataset.manifest.checksums:
            return changed
        for i, expected in enumerate(located.crc32c.tolist()):
            if crc32c(encoded[i]) == expected:
                continue
            shard, offset, size = (int(c[i]) for c in (located.shard, located.offset, located.size))
            if cache := self.disk_cache:
                for chunk in range(offset // cache.chunk_bytes, (offset + size - 1) // cache.chunk_bytes + 1):
                    cache.remove(shard, chunk)
            encoded[i] = _read(self.dataset, located, i)
            if crc32c(encoded[i]) != expected:
                changed.append(i)
        return changed

    def close(self) -> None:
        self.fetcher.close()


def _runs(located: Located, max_gap: int | Ints) -> tuple[Ints, Ints]:
    """The first and the last position of each run of samples that are read together: those of one shard with at most
    `max_gap` bytes between two."""
    gap = located.offset[1:] - (located.offset + located.size)[:-1]
    cuts = np.flatnonzero((np.diff(located.shard) != 0) | (gap > max_gap) | (gap < 0)) + 1
    return np.r_[0, cuts], np.r_[cuts, len(located.shard)] - 1


def _read(dataset: Dataset, located: Located, i: int) -> bytes:
    """The bytes of one sample, read in this process and not from the disk cache."""
    name = dataset.shard_name(int(located.shard[i]))
    try:
        return dataset.shard_store.read_range(name, int(located.offset[i]), int(located.size[i]))
    except FileNotFoundError:
        raise UserError(f"{dataset.shard_store.describe(name)} {MISSING}") from None


def _contiguous_runs(located: Located) -> Iterator[range]:
    """Positions of samples that are stored one after the other in a shard, with at most GAP_BYTES between two and at
    most RUN_BYTES in all (unless it is a single sample)."""
    ends = located.offset + located.size
    first = 0
    for i in range(1, len(ends) + 1):
        if i < len(ends) and located.shard[i] == located.shard[first]:
            gap = located.offset[i] - ends[i - 1]
            if 0 <= gap <= GAP_BYTES and ends[i] - located.offset[first] <= RUN_BYTES:
                continue
        yield range(first, i)
        first = i


def _read_run(dataset: Dataset, located: Located, rows: range) -> list[Encoded]:
    """The samples at these positions, with one read."""
    start, end = int(located.offset[rows[0]]), int(located.offset[rows[-1]] + located.size[rows[-1]])
    name = dataset.shard_name(int(located.shard[rows[0]]))
    try:
        data = memoryview(dataset.shard_store.read_range(name, start, end - start))
    except FileNotFoundError:
        raise UserError(f"{dataset.shard_store.describe(name)} {MISSING}") from None
    spans = ((int(located.offset[i]) - start, int(located.size[i])) for i in rows)
    return [data[offset : offset + size] for offset, size in spans]


def read_samples(dataset: Dataset, draws: Ints) -> Samples:
    """Read any samples (ids, or draws of an order: int64[n]) directly from storage, for pictures and evaluations. Samples that are stored
    next to each other are read together. UserError if a shard is missing or storage refuses for good."""
    located = dataset.locate(np.asarray(draws, np.int64) % dataset.samples)
    runs = READ_POOL.map(lambda rows: _read_run(dataset, located, rows), _contiguous_runs(located))
    encoded = [data for run in runs for data in run]
    expected = located.crc32c.tolist() if dataset.manifest.checksums else []
    changed = [i for i, crc in enumerate(expected) if crc32c(encoded[i]) != crc]
    ids = np.asarray(draws, np.int64) % dataset.samples
    return Samples(ids, located, encoded, changed, StageTimes(), np.asarray(draws, np.int64))
