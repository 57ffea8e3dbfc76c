"""Read-ahead: the encoded samples of each step, read from storage block by block before they are needed.

A block of a lane (`pipeline.loading.order`) is one or two contiguous byte ranges of shards, and all of its samples are
used within the next K samples of the lane. So a block is read as a whole, and its memory is freed when the last of its
samples has been trained on. For each step, in order:

1. Plan: find the blocks that the step is the first to need, read the indexes of their shards, and queue the blocks.
2. Request queued blocks from the fetch process: those that the current step needs at once, later ones as long as at
   most `lane_bytes` for each lane are requested and not used up.
3. Wait for the step's samples, and check their crc32c against the index. A sample that differs is read once more,
   directly from storage; if it still differs, it is a bad sample.

The first step of a lane is different, in the run's first step or where the worker gets other lanes: only the lane's samples of
that step are read, not their whole block, so that training can start soon. The rest of the block is read after it.

When workers are lost or join, steps may be read again, or for other lanes (`Reader.change`). So a block is kept until the trainer
is past its last step, and data of a lane is not read again as long as the worker has the lane.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from pipeline.arrays import Ints
from pipeline.dataset.dataset import Dataset, Located
from pipeline.dataset.manifest import index_name
from pipeline.decode.decoder import Encoded
from pipeline.errors import UserError
from pipeline.loading.blocks import GAP_BYTES, Block, Span, make_block
from pipeline.loading.disk_cache import DiskCache
from pipeline.loading.fetch_client import MISSING, Fetcher
from pipeline.loading.order import Order, Schedule
from pipeline.stage_times import StageTimes

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


class Reader:
    """Reads the samples of one worker for steps `start` to `stop` − 1, in order. Not thread-safe.

    Args:
        workers: which worker this one is.
        lane_bytes: how much may be requested or held beyond what the current step needs, for each lane.
        disk_cache: the node's disk cache, if there is one.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        workers: Schedule,
        start: int,
        stop: int,
        lane_bytes: int,
        disk_cache: DiskCache | None = None,
    ) -> None:
        self.dataset, self.order, self.disk_cache = dataset, order, disk_cache
        self.workers = workers
        self.start, self.stop, self.lane_bytes = start, stop, lane_bytes
        self.fetcher = Fetcher(dataset.shard_store.url, dataset.store.url, disk_cache)
        self.first_chunks = np.zeros_like(dataset.shard_bytes)
        if disk_cache:
            chunks = -(-dataset.shard_bytes // disk_cache.chunk_bytes)
            self.first_chunks = np.cumsum(chunks) - chunks
        self.done = start  # steps before it are not read again
        self.next_step = start  # to read
        self.next_plan = start  # the step to plan next
        # Of each lane: the first position, counted over all epochs, that is in no block yet; −1 if the lane is not ours.
        self.planned_until = np.full(order.lanes, -1)
        self.queue: deque[Block] = deque()  # planned but not requested
        self.blocks: dict[int, list[Block]] = {}  # last step → all blocks that are planned and not released
        self.held_bytes = 0  # of blocks that are requested and not released
        self.abandoned: list[Block] = []  # released, but perhaps still being read
        self.places: dict[
            int, tuple[Block, int]
        ] = {}  # epoch · most_draws + draw → its block, and its position in it
        self.indexes: dict[int, Future[memoryview]] = {}  # shard → its index, requested but not used yet
        self.waited_s = 0.0  # for storage, in all

    def read(self, step: int, done: int | None = None) -> Samples:
        """The samples of a step. Call it for each step in turn. UserError if storage refuses for good.

        `done`: keep what steps from this one on need, for `change`. By default steps up to this one are done.
        """
        begin, waited_s = time.perf_counter(), self.waited_s
        self.fetcher.buffers.spare_bytes = self.lane_bytes * len(self._lanes(step)) // 8
        # Read nothing else before the first step is complete: the device waits for it.
        self._request(step, ahead=step > self.start)
        draws = self.order.step_draws(step, *self.workers.at(step))
        ids = draws % self.order.samples
        first = step // self.order.steps_per_epoch * self.order.most_draws
        taken = [self.places[first + draw] for draw in draws.tolist()]
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
        self.next_step = step + 1
        self._release_until(step + 1 if done is None else done)
        self._request(step, ahead=True)
        changed = self._check(located, encoded)
        storage_s = self.waited_s - waited_s
        stage_times = StageTimes(storage=storage_s, read=time.perf_counter() - begin - storage_s)
        return Samples(ids, located, encoded, changed, stage_times, draws)

    def change(self, workers: Schedule, step: int, done: int) -> None:
        """Continue with `step`, as the worker that `workers` says. Steps from `done` on are kept, see `read`.

        Data is kept for the lanes that the worker still has.
        """
        changed = workers.first_difference(self.workers)
        self.workers = workers
        if step != self.next_step or (changed is not None and changed <= step):
            self.start = self.next_step = step
        plan_from = step if changed is None or step < self.done else max(step, changed)
        self._release_until(done)
        self._release_lost(done)
        self._plan_again(plan_from)

    def _release_until(self, done: int) -> None:
        """Release the blocks that only steps before `done` need."""
        before, self.done = self.done, done
        for step in range(before, done):
            self._release(list(self.blocks.get(step, ())))
        if self.workers.at(before) != self.workers.at(done):
            self._release_lost(done)

    def _release_lost(self, step: int) -> None:
        """Release the blocks that steps before `step` needed, of lanes that are not ours any more at `step`."""
        blocks = [block for blocks in self.blocks.values() for block in blocks if block.step < step]
        self._release([block for block in blocks if not self._kept(block, step).size])

    def _release(self, blocks: list[Block]) -> None:
        for block in blocks:
            for key in block.keys:
                if key in self.places and self.places[key][0] is block:
                    del self.places[key]
            self.blocks[block.last_step].remove(block)
            if not self.blocks[block.last_step]:
                del self.blocks[block.last_step]
            if block.data is None:
                self.queue.remove(block)
                continue
            self.held_bytes -= block.size
            if not block.data.done():
                self.abandoned.append(block)

    def _lanes(self, step: int) -> Ints:
        return self.order.lanes_of(*self.workers.at(step))

    def _kept(self, block: Block, step: int) -> Ints:
        """The lanes of a block that stay ours until `step`."""
        lanes = block.span.lanes
        for first, (rank, world_size) in self.workers.changes:
            if block.step < first <= step:
                lanes = lanes[lanes % world_size == rank]
        return lanes

    def _request(self, step: int, ahead: bool) -> None:
        """Request the blocks that `step` needs and, with `ahead`, later ones as far as `lane_bytes` allows."""
        # Of what is held, blocks that are only kept for `change` do not count.
        kept = sum(block.size for s in range(self.done, self.next_step) for block in self.blocks.get(s, ()))
        self.abandoned = [block for block in self.abandoned if block.data and not block.data.done()]
        kept -= sum(block.size for block in self.abandoned)
        lanes = len(self._lanes(step))
        while self.queue or self.next_plan < (self.stop if ahead else step + 1):
            if not self.queue:
                if not self._plan(self.next_plan, wait=self.next_plan <= step):
                    return
                self.next_plan += 1
                continue
            block = self.queue[0]
            # Of a step from which on there are fewer lanes, only as much as is allowed for these.
            most = kept + self.lane_bytes * min(lanes, len(self._lanes(block.step)))
            if block.step > step and self.held_bytes + block.size > most:
                return
            block.data = self.fetcher.read_ranges(block.ranges, fill_cache=not block.span.new)
            self.held_bytes += block.size
            self.queue.popleft()

    def _plan(self, step: int, wait: bool) -> bool:
        """Queue the blocks that `step` is the first to need. Returns False, and queues nothing, if their indexes have not
        arrived yet and `wait` is False."""
        order = self.order
        lanes, epoch = self._lanes(step), step // order.steps_per_epoch
        first, stop, before = step * order.per_lane, (step + 1) * order.per_lane, epoch * order.lane_length
        until = np.full_like(self.planned_until, -1)
        until[lanes] = self.planned_until[lanes]
        spans: list[Span] = []
        new = lanes[until[lanes] < first]
        if new.size:
            # Of these only the samples of this step, so that it is complete soon; the rest of their blocks later.
            spans.append(Span(new, first, stop, True))
            until[new] = stop
        while (behind := lanes[until[lanes] < stop]).size:
            ends = order.block_ends(behind, until[behind] - before) + before
            spans += [
                Span(np.array([lane]), a, b, False)
                for lane, a, b in zip(behind, until[behind].tolist(), ends.tolist(), strict=True)
            ]
            until[behind] = ends
        groups = [order.draws(epoch, s.lanes, np.arange(s.first, s.stop) - before).ravel() for s in spans]
        if not self._indexes_ready(groups, wait):
            return False
        if groups:
            self._queue(epoch, spans, groups)
        self.planned_until = until
        return True

    def _queue(self, epoch: int, spans: list[Span], groups: list[Ints]) -> None:
        """Queue a block for each of these spans. `groups`: their draws."""
        samples, first = self.order.samples, epoch * self.order.most_draws
        groups = [draws[np.argsort(draws % samples, kind="stable")] for draws in groups]
        # Look up all of them in one call: then each index is parsed only once, even if not all fit into memory.
        together = self.dataset.locate(np.concatenate(groups) % samples, self._index)
        ends = np.cumsum([len(draws) for draws in groups])
        for span, draws, end in zip(spans, groups, ends.tolist(), strict=True):
            here = slice(end - len(draws), end)
            located = Located(together.shard[here].copy(), together.row[here].copy())
            block = make_block(
                self.dataset, self.order, span, (first + draws).tolist(), self.first_chunks, located
            )
            self.queue.append(block)
            self.blocks.setdefault(block.last_step, []).append(block)
            self.places |= {key: (block, i) for i, key in enumerate(block.keys)}

    def _plan_again(self, step: int) -> None:
        """Plan the steps from `step` on again, with the blocks that have been requested for lanes that are still ours."""
        self.next_plan = max(self.next_plan, self.next_step)
        if step >= self.next_plan:
            return
        self.next_plan = step
        self.indexes.clear()  # perhaps of lanes that are not ours any more
        lanes, position = self._lanes(step), step * self.order.per_lane
        until = np.full_like(self.planned_until, -1)
        until[lanes] = position
        useful: list[Block] = []
        useless: list[Block] = []
        blocks = [block for blocks in self.blocks.values() for block in blocks if block.last_step >= step]
        for block in sorted(blocks, key=lambda block: block.span.first):
            own = self._kept(block, step)
            own = own[until[own] == max(block.span.first, position)]
            if own.size and not block.failed and (block.data is not None or block.step < step):
                until[own] = block.span.stop
                useful.append(block)
            elif block.step >= step:
                useless.append(block)
        self._release(useless)
        for block in useful:  # in which samples of others were found that are useless now
            self.places |= {key: (block, i) for i, key in enumerate(block.keys)}
        until[until == position] = -1  # nothing is held for them: they are new
        self.planned_until = until

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
