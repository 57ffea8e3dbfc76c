"""The training batches of one worker: from the step number to images on the device.

    step ─▶ sample ids ─▶ encoded samples ─▶ crop boxes, flips ─▶ images
            order.py       readahead.py       crops.py             pipeline/decode/
                              │ requests byte ranges
                           fetch process ─▶ disk cache, storage
                           fetch_process.py  disk_cache.py

The step number is the only state: `Loader.batch(step)` is a pure function of it. `Loader.steps` yields the same batches,
with samples read ahead by one thread and PREFETCH_BATCHES decoded ahead of the trainer.

Memory of a worker, for a dataset of any size (asserted by tests/pipeline/loading/test_memory.py):

    lane_bytes for each lane        encoded samples read ahead: two blocks
    PREFETCH_BATCHES + 2 steps      encoded samples of steps that the trainer is not past, which it may ask for again, and
      and a block of each lane      for each lane the rest of the block that contains them
    a quarter of these two and      unused room in buffers, and free buffers
      an eighth of the first
    PREFETCH_BATCHES + 2 batches    images. If a GPU decodes, they are in its memory, with the images of steps that
                                    are queued on its stream
    dataset.INDEX_BYTES             indexes, besides those that are being parsed, and 50 bytes per shard
    300 bytes per sample            position of each sample that is read ahead
    32 MB                           threads and images that are being decoded; more threads need one image each

The lanes are those of the steps on their way to the trainer (`Loader.change_workers`).

Memory of its fetch process, besides its imports: LARGE_READS pieces of at most GET_BYTES (for local files FILE_BYTES)
plus the two chunks at their ends, twice while a response body is joined, and SMALL_READS pieces of SMALL_BYTES
(constants of `pipeline.loading.fetch_process`).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pipeline.arrays import Ints
from pipeline.dataset.dataset import Dataset
from pipeline.decode.decoder import Decoder
from pipeline.errors import UserError
from pipeline.loading.crops import (
    AREA,
    CENTRE,
    Crops,
    centre_crops,
    fixed_crops,
    random_flips,
    random_resized_crops,
)
from pipeline.loading.disk_cache import CHUNK_BYTES, open_disk_cache
from pipeline.loading.fetch_client import Fetcher
from pipeline.loading.order import Order, Schedule, Worker
from pipeline.loading.readahead import Reader, Samples, read_samples
from pipeline.stage_times import StageTimes

PREFETCH_BATCHES = 2  # batches decoded ahead of the trainer
CONCURRENT_DECODES = 2  # batches decoded at the same time: a GPU works on one while the host parses the other
CHANGED = "its bytes changed (crc32c differs from the index)"
log = logging.getLogger("maestream")


@dataclass(frozen=True)
class Batch:
    """A worker's part of one global batch: n samples."""

    # [n, channels, h, w] of the decoder's `pixels` (uint8 RGB by default), on its device; the other tensors are on the CPU
    images: torch.Tensor
    labels: torch.Tensor  # int64[n], or float32[n, classes] if they are not one class, see `Dataset.labels`
    sample_ids: torch.Tensor  # int64[n]
    weights: torch.Tensor  # float32[n]: 1, or 0 for a bad sample, whose image is zeros
    bad: dict[int, str]  # position of a bad sample → the reason
    stage_times: StageTimes  # thread-seconds spent on making this batch
    # Of a mix whose epochs take some samples several times: int64[n], see `Order.draws`. Otherwise None.
    draws: torch.Tensor | None = None
    # Of a dataset with parts (`pipeline.dataset.manifest.Part`): float64[n, names], 1 in the column of the sample's part.
    parts: torch.Tensor | None = None

    @property
    def random_ids(self) -> torch.Tensor:
        """int64[n]: what random numbers of a sample depend on, with the epoch. Each differs from all others of the epoch."""
        return self.sample_ids if self.draws is None else self.draws


@dataclass(frozen=True, kw_only=True)
class TrainBatch(Batch):
    """A worker's part of the global batch of an optimizer step."""

    step: int
    epoch: int
    wait_s: float  # seconds that the trainer waited for it


class Loader:
    """The training batches of one worker.

    Args:
        order: the data order.
        decoder: decodes, crops and resizes the images.
        rank, world_size: this worker, and the number of workers, until `change_workers`.
        disk_cache: folder and size in bytes of the disk cache, which the workers of a node share; None: no cache.
        crop_area: smallest and largest area of random crops, as a share of the image's area.
        crops: "random": random area, aspect ratio and position; "fixed": the evaluation crop's size at a random
            position; "centre": the evaluation crop.
        flips: mirror half of the images.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        decoder: Decoder,
        rank: int,
        world_size: int,
        disk_cache: tuple[str, int] | None = None,
        crop_area: tuple[float, float] = AREA,
        crops: Crops = "random",
        flips: bool = True,
    ) -> None:
        self.dataset = dataset
        self.crop_area, self.crops, self.flips = crop_area, crops, flips
        self.order, self.decoder, self.disk_cache = order, decoder, disk_cache
        self.workers = Schedule.constant(rank, world_size)
        self.prefetcher: Prefetcher | None = None  # of the latest call of `steps` or `prepare`
        self.fetcher: Fetcher | None = None  # likewise
        # Names of a mix's parts, of which several may have one; and the place in these names of each part.
        self.part_names = list(dict.fromkeys(part.name for part in dataset.manifest.parts))
        if len(self.part_names) == 1:
            self.part_names = []
        parts = dataset.manifest.parts if self.part_names else []
        self.part_columns = [self.part_names.index(part.name) for part in parts]
        # Two blocks of each lane, the one in use and the next, each with a chunk more at its ends.
        self.lane_bytes = 2 * (int(order.block * dataset.mean_read_bytes) + CHUNK_BYTES)
        order.lanes_of(rank, world_size)  # UserError if there are too many workers

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0 over all epochs."""
        draws = self.order.step_draws(step, *self.workers.at(step))
        return _on_current_stream(self.decode(step, read_samples(self.dataset, draws)))

    def steps(self, start: int, stop: int) -> Generator[TrainBatch, None, None]:
        """The batches of steps `start` to `stop` − 1, made ahead by threads: one reads, CONCURRENT_DECODES decode."""
        self.prepare(start, stop)
        assert self.prefetcher
        prefetcher = self.prefetcher
        prefetcher.in_use = True
        try:
            while prefetcher.next_step < stop:
                yield prefetcher.take()
        finally:
            prefetcher.close()
            if self.prefetcher is prefetcher:
                self.prefetcher = None

    def prepare(self, start: int, stop: int) -> None:
        """Start to read and decode the batches of `steps(start, stop)` in the background, before they are asked for: for a worker
        that will join at a step which is known before. `steps` may begin with another step than `start` after all."""
        prepared = self.prefetcher
        if prepared and not prepared.in_use:
            if prepared.stop == stop:
                prepared.start = start
                prepared.continue_with(start, self.workers)
                return
            prepared.close()
        with ExitStack() as stack:
            reader = self._reader(stack, start, stop)
            self.prefetcher = Prefetcher(reader, self.decode, stack.pop_all())
        self.fetcher = reader.fetcher
        self.prefetcher.fill()

    def wait(self) -> None:
        """Wait until the first batch after `prepare` is there. Raises UserError if it cannot be made."""
        if self.prefetcher and self.prefetcher.upcoming:
            self.prefetcher.upcoming[0].batch.result()

    def change_workers(self, step: int, rank: int, world_size: int) -> None:
        """From step `step` on, make the batches of worker `rank` of `world_size`. UserError if there are more workers than lanes.

        Call it from the thread that iterates over `steps`, or before. It replaces earlier calls for `step` and later steps.

        `step` may be any step from the one that was yielded last on. If it is that one, it is yielded again, for the new worker.
        If it is a later one, the steps before it come first, as before; `skip_to` leaves them out.

        Samples that have been read for lanes which the worker still has are not read again. Batches that were made ahead for another
        worker are dropped, also those that failed, and made anew.
        """
        self.order.lanes_of(rank, world_size)
        self.workers = self.workers.changed(step, Worker(rank, world_size))
        if self.prefetcher:
            self.prefetcher.continue_with(min(step, self.prefetcher.next_step), self.workers)

    def skip_to(self, step: int) -> None:
        """Yield no steps before `step` any more: other workers have done them. Call it from the thread that iterates over `steps`."""
        if self.prefetcher and step > self.prefetcher.next_step:
            self.prefetcher.continue_with(step, self.workers)

    def _reader(self, stack: ExitStack, start: int, stop: int) -> Reader:
        disk_cache = None
        if self.disk_cache:
            folder, max_bytes = self.disk_cache
            chunks = int((-(-self.dataset.shard_bytes // CHUNK_BYTES)).sum())
            try:
                disk_cache = stack.enter_context(
                    open_disk_cache(folder, max_bytes, self.dataset.identity, chunks)
                )
            except OSError as error:
                raise UserError(
                    f"data.cache={folder} cannot be used ({error.strerror}): choose another folder"
                ) from None
        reader = Reader(self.dataset, self.order, self.workers, start, stop, self.lane_bytes, disk_cache)
        return stack.enter_context(closing(reader))

    def cache_hit_rate(self) -> float:
        """Share of the bytes read by `steps` so far that came from the disk cache."""
        fetcher = self.fetcher
        total = fetcher.cached_bytes + fetcher.storage_bytes if fetcher else 0
        return fetcher.cached_bytes / total if fetcher and total else 0.0

    def decode(self, step: int, samples: Samples) -> Batch:
        epoch = step // self.order.steps_per_epoch
        located = samples.located
        seed, ids, height, width = self.order.seed, samples.draws, located.height, located.width
        if self.crops == "random":
            boxes = random_resized_crops(seed, epoch, ids, height, width, self.crop_area)
        elif self.crops == "fixed":
            boxes = fixed_crops(seed, epoch, ids, height, width, aspect_of(self.decoder))
        else:
            boxes = centre_crops(height, width, CENTRE, aspect_of(self.decoder))
        flips = random_flips(seed, epoch, ids) if self.flips else np.zeros(len(ids), bool)
        batch = decode_batch(self.dataset, self.decoder, samples, boxes, flips)
        draws = torch.from_numpy(samples.draws) if self.order.weights else None
        return replace(batch, draws=draws, parts=self._parts(samples.ids))

    def _parts(self, ids: Ints) -> torch.Tensor | None:
        """See `Batch.parts`."""
        if not self.part_columns:
            return None
        columns = torch.tensor(self.part_columns)[torch.from_numpy(self.dataset.part_of(ids))]
        return torch.nn.functional.one_hot(columns, len(self.part_names)).double()

    def close(self) -> None:
        if self.prefetcher:
            self.prefetcher.close()
        self.decoder.close()


@dataclass(eq=False)
class Upcoming:
    """A batch that is being made ahead of the trainer."""

    step: int
    workers: Schedule
    done: int  # see `Reader.read`
    after: list[Future[Batch | None]]  # dropped batches that have to end before
    batch: Future[Batch | None] = field(init=False)
    dropped: bool = False


Decode = Callable[[int, Samples], Batch]


class Prefetcher:
    """Makes the batches of a reader's steps in threads: one reads, CONCURRENT_DECODES decode.

    Args:
        resources: to close with it, the reader among them.
    """

    def __init__(self, reader: Reader, decode: Decode, resources: ExitStack) -> None:
        self.reader, self.decode, self.resources = reader, decode, resources
        self.workers, self.start, self.stop = reader.workers, reader.start, reader.stop
        self.next_step = self.start  # to give to the trainer
        self.done = self.start  # the trainer is past the steps before it
        self.in_use = False
        self.upcoming: deque[Upcoming] = deque()  # from `next_step` on
        self.dropped: list[Future[Batch | None]] = []  # perhaps still being made
        self.reading = ThreadPoolExecutor(1, "reader")
        self.decoding = ThreadPoolExecutor(CONCURRENT_DECODES, "decoder")

    def take(self) -> TrainBatch:
        """The batch of `next_step`. The trainer is past all steps before it."""
        step = self.done = self.next_step
        self.fill()
        begin = time.perf_counter()
        batch = self.upcoming.popleft().batch.result()
        assert batch
        batch = _on_current_stream(batch)
        wait_s = time.perf_counter() - begin
        self.next_step += 1
        epoch = step // self.reader.order.steps_per_epoch
        return TrainBatch(**vars(batch), step=step, epoch=epoch, wait_s=wait_s)

    def fill(self) -> None:
        """Start to make batches that are to be made ahead."""
        while len(self.upcoming) <= PREFETCH_BATCHES:
            step = self.next_step + len(self.upcoming)
            if step >= self.stop:
                return
            upcoming = Upcoming(step, self.workers, self.done, self.dropped)
            self.dropped = []
            samples = self.reading.submit(self._read, upcoming)
            upcoming.batch = self.decoding.submit(self._decode, upcoming, samples)
            self.upcoming.append(upcoming)

    def continue_with(self, step: int, workers: Schedule) -> None:
        """Let `step` be the next one, and `workers` say for which worker batches are. Keep those that are right already."""
        self.workers = workers
        self.next_step = max(step, self.start)
        self.done = min(self.done, self.next_step)
        kept: deque[Upcoming] = deque()
        for upcoming in self.upcoming:
            right = upcoming.workers.at(upcoming.step) == workers.at(upcoming.step)
            if right and upcoming.step == self.next_step + len(kept):
                kept.append(upcoming)
            else:
                upcoming.dropped = True
                self.dropped.append(upcoming.batch)
        self.upcoming = kept
        self.fill()

    def _read(self, upcoming: Upcoming) -> Samples:
        # Samples and images of dropped batches are free before others are read.
        wait(upcoming.after)
        upcoming.after.clear()
        if upcoming.dropped:
            raise CancelledError
        step, workers, done = upcoming.step, upcoming.workers, upcoming.done
        if workers is not self.reader.workers or step != self.reader.next_step:
            self.reader.change(workers, step, done)
        return self.reader.read(step, done)

    def _decode(self, upcoming: Upcoming, samples: Future[Samples]) -> Batch | None:
        """None if it is dropped. An error would refer to its traceback, so to the samples."""
        encoded = samples.result()
        return None if upcoming.dropped else self.decode(upcoming.step, encoded)

    def close(self) -> None:
        self.resources.close()  # first: so nothing waits for storage any more
        self.reading.shutdown(cancel_futures=True)
        self.decoding.shutdown(cancel_futures=True)


def aspect_of(decoder: Decoder) -> float:
    """Width / height of a decoder's images."""
    return decoder.size[1] / decoder.size[0]


def decode_batch(
    dataset: Dataset, decoder: Decoder, samples: Samples, boxes: Ints, flips: np.ndarray
) -> Batch:
    """Decode samples with crop boxes (int64[n, 4]) and flips (bool[n]).

    A bad sample, whose bytes have changed or cannot be decoded, stays in the batch with weight 0 and is logged.
    """
    changed = set(samples.changed)
    decoded = decoder([b"" if i in changed else data for i, data in enumerate(samples.encoded)], boxes, flips)
    bad = decoded.bad | dict.fromkeys(samples.changed, CHANGED)
    weights = torch.ones(len(samples.ids))
    for i, reason in bad.items():
        weights[i] = 0
        shard = dataset.shard_store.describe(dataset.shard_name(int(samples.located.shard[i])))
        log.warning(
            "bad sample %d, %s at byte %d of %s: %s",
            samples.ids[i],
            *dataset.keys(samples.ids[i : i + 1]),
            samples.located.offset[i],
            shard,
            reason,
        )
    labels = torch.from_numpy(dataset.labels(samples.located.row))
    ids, stage_times = torch.from_numpy(samples.ids), samples.stage_times + decoded.stage_times
    return Batch(decoded.images, labels, ids, weights, bad, stage_times)


def centred_batch(dataset: Dataset, decoder: Decoder, ids: Ints, side: float = CENTRE) -> Batch:
    """Samples (ids: int64[n]) with centre crops and no flips, for pictures and evaluations.

    Args:
        side: of the crops, as a share of the image's shorter side.
    """
    samples = read_samples(dataset, ids)
    boxes = centre_crops(samples.located.height, samples.located.width, side, aspect_of(decoder))
    return _on_current_stream(decode_batch(dataset, decoder, samples, boxes, np.zeros(len(ids), bool)))


def _on_current_stream(batch: Batch) -> Batch:
    """The same batch, safe to use on the caller's CUDA stream.

    The decoder allocated the images on its own stream (`pipeline.decode.dali`), so torch would reuse their memory there
    as soon as the tensor is freed. The caller's stream may not have read it by then, so torch has to wait for it too.
    """
    if batch.images.is_cuda:
        batch.images.record_stream(torch.cuda.current_stream(batch.images.device))
    return batch
