"""Batches of a dataset, in order: which samples, their bytes, their crops, their pixels.

The only state is the step number: `batch(step)` is a pure function of it, and iterating is a thread that
calls it ahead of time.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from crc32c import crc32c

from pipeline.augment import centre_crops, random_flips, random_resized_crops
from pipeline.cache import CHUNK_BYTES, ChunkCache
from pipeline.decode import Decoder
from pipeline.manifest import Dataset
from pipeline.order import Ints, Order

AHEAD = 2  # batches made ahead of the trainer; the bytes of one more are being fetched
log = logging.getLogger("maestream")


@dataclass(frozen=True)
class Batch:
    """A worker's part of one global batch, n samples."""

    images: torch.Tensor  # uint8[n, 3, size, size], RGB
    labels: torch.Tensor  # int64[n], NO_LABEL where there is none
    sample_ids: torch.Tensor  # int64[n]
    weights: torch.Tensor  # float32[n]: 1, or 0 for a bad sample, whose pixels are zeros


@dataclass(frozen=True)
class TrainBatch(Batch):
    step: int
    epoch: int
    wait_s: float  # how long the trainer waited for it


class Loader:
    """The training batches of one worker.

    Args:
        order: which sample is at which place.
        decoder: makes the pixels.
        rank, world_size: this worker, and how many there are.
    """

    def __init__(self, dataset: Dataset, order: Order, decoder: Decoder, rank: int, world_size: int) -> None:
        self.dataset = dataset
        self.order = order
        self.decoder = decoder
        self.rank = rank
        self.world_size = world_size
        lanes = len(order.lanes_of(rank, world_size))
        # Two blocks of each lane (DESIGN.md, Order), but no less than what is read ahead.
        block = max(order.block, (AHEAD + 2) * order.per_lane)
        capacity = 2 * lanes * (int(block * dataset.mean_sample_bytes) + CHUNK_BYTES)
        self.cache = ChunkCache(dataset, capacity)

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0 over all epochs."""
        ids = self.order.step_ids(step, self.rank, self.world_size)
        epoch = step // self.order.steps_per_epoch
        located = self.dataset.locate(ids)
        boxes = random_resized_crops(self.order.seed, epoch, ids, located.height, located.width)
        flips = random_flips(self.order.seed, epoch, ids)
        return read_batch(self.dataset, self.cache, self.decoder, ids, boxes, flips)

    def steps(self, start: int, stop: int) -> Iterator[TrainBatch]:
        """Batches of steps `start` to `stop`, made ahead of time by a thread."""
        upcoming = iter(range(start, stop))
        waiting: deque[Future[Batch]] = deque()
        maker = ThreadPoolExecutor(1, thread_name_prefix="loader")
        try:
            for step in range(start, stop):
                for ahead in itertools.islice(upcoming, AHEAD + 1 - len(waiting)):
                    waiting.append(maker.submit(self._make, ahead, stop))
                begin = time.perf_counter()
                batch = waiting.popleft().result()
                wait_s = time.perf_counter() - begin
                epoch = step // self.order.steps_per_epoch
                yield TrainBatch(**vars(batch), step=step, epoch=epoch, wait_s=wait_s)
        finally:
            maker.shutdown(cancel_futures=True)

    def _make(self, step: int, stop: int) -> Batch:
        if step + 1 < stop:  # its bytes come while this step is decoded
            ids = self.order.step_ids(step + 1, self.rank, self.world_size)
            self.cache.prefetch(self.dataset.locate(ids))
        return self.batch(step)

    def close(self) -> None:
        self.cache.close()
        self.decoder.close()


def read_batch(
    dataset: Dataset, cache: ChunkCache, decoder: Decoder, ids: Ints, boxes: Ints, flips: np.ndarray
) -> Batch:
    """Samples `ids` (int[n]) through crop boxes (int[n, 4]) and flips (bool[n]).

    A sample whose bytes changed or do not decode keeps its place with weight 0, and is named in the log.
    """
    located = dataset.locate(ids)
    encoded = cache.read(located)
    decoded = decoder(encoded, boxes, flips)
    bad = dict(decoded.bad)
    for i, (data, expected) in enumerate(zip(encoded, located.crc32c.tolist(), strict=True)):
        if crc32c(data) != expected:
            bad[i] = "its bytes changed (crc32c differs from the index)"
    weights = torch.ones(len(ids))
    for i, reason in bad.items():
        weights[i] = 0
        decoded.images[i] = 0
        shard = dataset.store.describe(dataset.shard_name(int(located.shard[i])))
        log.warning(
            "bad sample %d, %s at byte %d of %s: %s",
            ids[i],
            *dataset.keys(ids[i : i + 1]),
            located.offset[i],
            shard,
            reason,
        )
    return Batch(decoded.images, torch.from_numpy(located.label), torch.from_numpy(ids), weights)


def centred_batch(dataset: Dataset, decoder: Decoder, ids: Ints) -> Batch:
    """Samples `ids` (int[n]) through their centre crops, unflipped: for pictures and evaluations."""
    located = dataset.locate(ids)
    cache = ChunkCache(dataset, int(located.size.sum()) + 2 * len(ids) * CHUNK_BYTES)
    try:
        boxes = centre_crops(located.height, located.width)
        return read_batch(dataset, cache, decoder, np.asarray(ids), boxes, np.zeros(len(ids), bool))
    finally:
        cache.close()
