"""Batches of a dataset, in order: which samples, their bytes, their crops, their pixels.

The only state is the step number: `batch(step)` is a pure function of it, and `steps` yields the same, with
storage read ahead and pixels made ahead of time.

What a worker takes of memory for this, at any size of the dataset (tests/pipeline/test_memory.py):

    bound_bytes                     encoded samples read ahead, two blocks of each lane
    AHEAD + 2 steps, and a block    encoded samples that were taken and are not decoded, and of each lane the
                                    rest of a block that they lie in
    a quarter of those two, and     what buffers have beyond what lies in them, and buffers that wait to be
    an eighth of bound_bytes        filled again
    AHEAD + 2 batches               pixels; where a GPU decodes them they are in its memory, and there too those of
                                    the steps that its stream has not come to
    manifest.INDEX_BYTES            indexes, at most, beside those that are just being read, and 50 bytes a shard
    300 bytes a sample read ahead   where each of them is
    32 MB                           threads and what a few of them decode; each more takes an image's pixels more

Its fetcher takes fetching.LARGE_READS pieces of at most fetching.GET_BYTES (of files FILE_BYTES) and the two
chunks they lie in, twice while a body is put together, and SMALL_READS of SMALL_BYTES, beside what it imports.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.augment import (
    AREA,
    CENTRE,
    Crops,
    centre_crops,
    fixed_crops,
    random_flips,
    random_resized_crops,
)
from pipeline.cache import CHUNK_BYTES, open_kept_part
from pipeline.decode import Decoder
from pipeline.errors import UserError
from pipeline.fetcher import Fetcher
from pipeline.manifest import Dataset
from pipeline.order import Ints, Order
from pipeline.reader import Reader, Samples, read_samples
from pipeline.spent import Spent

AHEAD = 2  # batches made ahead of the trainer
DECODING = 2  # batches that decode at once: a GPU works on one while the host parses the other
CHANGED = "its bytes changed (crc32c differs from the index)"
log = logging.getLogger("maestream")


@dataclass(frozen=True)
class Batch:
    """A worker's part of one global batch, n samples."""

    images: torch.Tensor  # uint8[n, 3, h, w], RGB, where the decoder makes them; all else is on the CPU
    labels: torch.Tensor  # int64[n], NO_LABEL where there is none
    sample_ids: torch.Tensor  # int64[n]
    weights: torch.Tensor  # float32[n]: 1, or 0 for a bad sample, whose pixels are zeros
    bad: dict[int, str]  # position of a bad sample → why it is bad
    spent: Spent  # to make it, ahead of the trainer


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
        cache: folder and bytes of the kept part, shared by the workers of a node; None: no part is kept.
        crop_area: of random crops, least and most, as a share of the image.
        crops: of any size and place, of one size anywhere, or always the same one.
        flips: whether half of the images are mirrored.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        decoder: Decoder,
        rank: int,
        world_size: int,
        cache: tuple[str, int] | None = None,
        crop_area: tuple[float, float] = AREA,
        crops: Crops = "random",
        flips: bool = True,
    ) -> None:
        self.dataset = dataset
        self.crop_area, self.crops, self.flips = crop_area, crops, flips
        self.order = order
        self.decoder = decoder
        self.rank = rank
        self.world_size = world_size
        self.cache = cache
        # Two blocks of each lane (DESIGN.md, Order).
        lanes = len(order.lanes_of(rank, world_size))
        self.fetcher: Fetcher | None = None  # of the newest `steps`
        self.bound_bytes = 2 * lanes * (int(order.block * dataset.mean_sample_bytes) + CHUNK_BYTES)

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0 over all epochs."""
        ids = self.order.step_ids(step, self.rank, self.world_size)
        return _taken(self._decode(step, read_samples(self.dataset, ids)))

    def steps(self, start: int, stop: int) -> Generator[TrainBatch, None, None]:
        """Batches of steps `start` to `stop`, made ahead of time by threads: one reads, DECODING decode."""
        upcoming = iter(range(start, stop))
        waiting: deque[Future[Batch]] = deque()
        with ExitStack() as stack:
            reading, decoding = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(DECODING, "decoder")
            stack.callback(decoding.shutdown, cancel_futures=True)
            stack.callback(reading.shutdown, cancel_futures=True)
            reader = stack.enter_context(closing(self._reader(stack, start, stop)))
            for step in range(start, stop):
                for ahead in itertools.islice(upcoming, AHEAD + 1 - len(waiting)):
                    samples = reading.submit(reader.read, ahead)
                    waiting.append(decoding.submit(lambda s, f: self._decode(s, f.result()), ahead, samples))
                begin = time.perf_counter()
                batch = _taken(waiting.popleft().result())
                wait_s = time.perf_counter() - begin
                epoch = step // self.order.steps_per_epoch
                yield TrainBatch(**vars(batch), step=step, epoch=epoch, wait_s=wait_s)

    def _reader(self, stack: ExitStack, start: int, stop: int) -> Reader:
        kept = None
        if self.cache:
            folder, bound = self.cache
            chunks = int((-(-self.dataset.shard_bytes // CHUNK_BYTES)).sum())
            try:
                kept = stack.enter_context(open_kept_part(folder, bound, self.dataset.identity, chunks))
            except OSError as error:
                raise UserError(
                    f"data.cache={folder} cannot be used ({error.strerror}): choose another folder"
                ) from None
        reader = Reader(
            self.dataset, self.order, self.rank, self.world_size, start, stop, self.bound_bytes, kept
        )
        self.fetcher = reader.fetcher
        return reader

    def cache_hit_rate(self) -> float:
        """What share of the bytes that `steps` has read so far came from the kept part."""
        fetcher = self.fetcher
        total = fetcher.kept_bytes + fetcher.storage_bytes if fetcher else 0
        return fetcher.kept_bytes / total if fetcher and total else 0.0

    def _decode(self, step: int, samples: Samples) -> Batch:
        epoch = step // self.order.steps_per_epoch
        located = samples.located
        seed, ids, height, width = self.order.seed, samples.ids, located.height, located.width
        if self.crops == "random":
            boxes = random_resized_crops(seed, epoch, ids, height, width, self.crop_area)
        elif self.crops == "fixed":
            boxes = fixed_crops(seed, epoch, ids, height, width, aspect_of(self.decoder))
        else:
            boxes = centre_crops(height, width, CENTRE, aspect_of(self.decoder))
        flips = random_flips(seed, epoch, ids) if self.flips else np.zeros(len(ids), bool)
        return decode_batch(self.dataset, self.decoder, samples, boxes, flips)

    def close(self) -> None:
        self.decoder.close()


def aspect_of(decoder: Decoder) -> float:
    """Width over height of what a decoder makes."""
    return decoder.size[1] / decoder.size[0]


def decode_batch(
    dataset: Dataset, decoder: Decoder, samples: Samples, boxes: Ints, flips: np.ndarray
) -> Batch:
    """Samples through crop boxes (int[n, 4]) and flips (bool[n]).

    A sample whose bytes changed or do not decode keeps its place with weight 0, and is named in the log.
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
    labels = torch.from_numpy(samples.located.label)
    ids, spent = torch.from_numpy(samples.ids), samples.spent + decoded.spent
    return Batch(decoded.images, labels, ids, weights, bad, spent)


def centred_batch(dataset: Dataset, decoder: Decoder, ids: Ints, side: float = CENTRE) -> Batch:
    """Samples `ids` (int[n]) through their centre crops, `side` of the shorter side, unflipped: for pictures and
    evaluations."""
    samples = read_samples(dataset, ids)
    boxes = centre_crops(samples.located.height, samples.located.width, side, aspect_of(decoder))
    return _taken(decode_batch(dataset, decoder, samples, boxes, np.zeros(len(ids), bool)))


def _taken(batch: Batch) -> Batch:
    """The same batch, for the caller's CUDA stream.

    A decoder took the memory of its images on a stream of its own (`pipeline.decode.dali`), and torch hands it out
    there again as soon as nobody holds the tensor. By then the caller's stream, which runs behind its thread,
    may not have read it: so torch is told to wait for that stream too.
    """
    if batch.images.is_cuda:
        batch.images.record_stream(torch.cuda.current_stream(batch.images.device))
    return batch
