"""Compute the mean and standard deviation of a dataset's pixels, see `pipeline.dataset.statistics`.

The result does not depend on how many tasks do the work: the samples are split into the same jobs, and the results of jobs are
added in the same order. Sums over 8-bit and 16-bit pixels are exact integers. Floats are summed as float64, by the mean and the
squared distances from it (Chan, Golub and LeVeque 1983), so that no digits cancel.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Ints
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.statistics import SCALES, Statistics
from pipeline.errors import UserError, why_undecodable
from pipeline.hashing import hash64
from pipeline.images.convert import LUMA, convert, significant_bits
from pipeline.images.formats import read_pixels
from pipeline.images.pixels import Pixels
from pipeline.loading.readahead import read_samples
from pipeline.parallel import ParallelMap, map_ahead
from pipeline.text import plural

SAMPLE_STREAM = 61  # stream of the hash that chooses a random sample
JOB_SAMPLES = 512  # samples of a job; changing it changes the last digits of the result for floats
READ_BYTES = 32 << 20  # encoded images that are read at a time
BLOCK_PIXELS = (
    1 << 20
)  # pixels summed at a time; sums of squares of 16-bit pixels stay below 2^53, so float64 holds them exactly
HASHED = 1 << 22  # sample ids that are hashed at a time
Array = npt.NDArray[Any]


@dataclass
class Moments:
    """Number, mean and summed squared distance from the mean of values."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, count: int, mean: float, squares: float) -> None:
        """Add other values, described in the same way."""
        if not count:
            return
        total, distance = self.count + count, mean - self.mean
        self.mean += distance * count / total
        self.squares += squares + distance * distance * self.count * count / total
        self.count = total

    def add_values(self, values: Array) -> None:
        """Add values, float64[n]."""
        if len(values):
            mean = float(values.mean())
            self.add(len(values), mean, float(np.square(values - mean).sum()))

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count)


@dataclass
class ExactMoments:
    """Number, sum and sum of squares of integers. Adding them is exact."""

    count: int = 0
    total: int = 0
    squares: int = 0

    def add_values(self, values: Array) -> None:
        """Add at most BLOCK_PIXELS integers below 2^16, as float64[n]."""
        self.count += len(values)
        self.total += int(values.sum())
        self.squares += int(values @ values)

    def moments(self) -> Moments:
        # Division of Python's integers is correctly rounded.
        squares = (self.count * self.squares - self.total**2) / self.count
        return Moments(self.count, self.total / self.count, squares)


@dataclass(frozen=True)
class StatisticsJob:
    """Some samples of a dataset. The input of one task."""

    number: int
    url: str
    ids: Ints


@dataclass
class JobResult:
    """The sums over the samples of a job."""

    number: int
    exact: list[ExactMoments]  # of each channel; used for integers
    moments: list[Moments]  # of each channel; used for floats
    grey: Moments = field(default_factory=Moments)
    images: int = 0
    pixels: int = 0
    bad: list[str] = field(default_factory=list)  # images that cannot be read, which are left out


@dataclass(frozen=True)
class StatisticsResult:
    """Statistics, and the images that cannot be read, which are left out."""

    statistics: Statistics
    bad: list[str]


def compute_statistics(
    dataset: Dataset,
    samples: int | None,
    seed: int,
    run: ParallelMap = map,
    on_images: Callable[[int], object] = lambda images: None,
) -> StatisticsResult:
    """Compute the statistics of a dataset, over all its images or a random sample.

    Args:
        samples: size of the sample; None: all images.
        seed: of the sample.
        run: does the work, see `pipeline.parallel`.
        on_images: called with the number of images that were read since the last call.

    Raises UserError if no image can be read.
    """
    ids = np.arange(dataset.samples)
    whole = samples is None or samples >= dataset.samples
    if samples is not None and not whole:
        ids = sample_ids(dataset.samples, samples, seed)
    parts = [ids[i : i + JOB_SAMPLES] for i in range(0, len(ids), JOB_SAMPLES)]
    jobs = [StatisticsJob(number, dataset.store.url, part) for number, part in enumerate(parts)]
    results: list[JobResult] = []
    for result in run(sum_pixels, jobs):
        results.append(result)
        on_images(result.images + len(result.bad))
    results.sort(key=lambda result: result.number)
    bad = [line for result in results for line in result.bad]
    images = sum(result.images for result in results)
    if not images:
        raise UserError(f"{dataset.store.url}: none of {plural(len(ids), 'image')} can be read ({bad[0]})")
    pixels = dataset.manifest.pixels
    moments = _add_up(results, pixels.dtype != "float32")
    grey = Moments()
    for result in results:
        grey.add(result.grey.count, result.grey.mean, result.grey.squares)
    scale = SCALES[pixels.dtype]
    statistics = Statistics(
        fingerprint=dataset.fingerprint,
        dtype=pixels.dtype,
        mean=tuple(channel.mean / scale for channel in moments),
        std=tuple(channel.std / scale for channel in moments),
        grey=(grey.mean / scale, grey.std / scale) if grey.count else None,
        images=images,
        pixels=sum(result.pixels for result in results),
        samples=None if whole else samples,
        seed=None if whole else seed,
    )
    return StatisticsResult(statistics, bad)


def sample_ids(total: int, samples: int, seed: int) -> Ints:
    """Choose `samples` of `total` sample ids at random, sorted. A larger sample of the same seed contains a smaller one."""
    best = np.empty(0, np.int64)
    for first in range(0, total, HASHED):
        ids = np.concatenate([best, np.arange(first, min(first + HASHED, total))])
        best = ids[np.argsort(hash64(seed, SAMPLE_STREAM, ids), kind="stable")[:samples]]
    return np.sort(best)


def sum_pixels(job: StatisticsJob) -> JobResult:
    """Sum the pixels of a job's images."""
    dataset = open_dataset(job.url, already_reached=True)
    channels = dataset.manifest.pixels.channels
    result = JobResult(
        job.number, [ExactMoments() for _ in range(channels)], [Moments() for _ in range(channels)]
    )
    for sample, image in _read_images(dataset, job.ids):
        if isinstance(image, str):
            result.bad.append(f"{dataset.keys([sample])[0]}: {image}")
        else:
            _add_image(result, image)
    return result


def _read_images(dataset: Dataset, ids: Ints) -> Iterator[tuple[int, Array | str]]:
    """Yield the id of each sample, and its pixels [h, w, c] or the reason why it cannot be read. One part is read ahead."""
    before = np.cumsum(dataset.locate(ids).size) // READ_BYTES
    parts = np.split(ids, np.flatnonzero(np.diff(before)) + 1)
    for samples in map_ahead(lambda part: read_samples(dataset, part), parts, 1, lambda _: 1, 2):
        changed = set(samples.changed)
        for row, sample in enumerate(samples.ids.tolist()):
            if row in changed:
                yield sample, "its bytes changed (crc32c differs from the index)"
                continue
            try:
                yield sample, _read(samples.encoded[row], dataset.manifest.pixels)
            except Exception as error:  # libraries raise nearly any exception on damaged files
                yield sample, why_undecodable(error)


def _read(data: bytes | memoryview, pixels: Pixels) -> Array:
    """Read an image, [h, w, c], as batches have it. ValueError, among others, where decoders report a bad sample."""
    image = read_pixels(data)
    return convert(image, significant_bits(data, image, pixels.bits), pixels)


def _add_image(result: JobResult, image: Array) -> None:
    """Add an image, [h, w, c]."""
    exact = image.dtype != np.float32
    channels: Sequence[ExactMoments | Moments] = result.exact if exact else result.moments
    flat = image.reshape(-1, image.shape[2])
    for first in range(0, len(flat), BLOCK_PIXELS):
        block = flat[first : first + BLOCK_PIXELS].astype(np.float64)
        for channel, moments in enumerate(channels):
            moments.add_values(np.ascontiguousarray(block[:, channel]))
        if block.shape[1] == 3:
            result.grey.add_values(block @ (np.array(LUMA) / 65536))
    result.images += 1
    result.pixels += len(flat)


def _add_up(results: list[JobResult], exact: bool) -> list[Moments]:
    """Return the moments of each channel over all jobs."""
    moments = []
    for channel in range(len(results[0].exact)):
        if exact:
            parts = [result.exact[channel] for result in results]
            total = ExactMoments(
                sum(p.count for p in parts), sum(p.total for p in parts), sum(p.squares for p in parts)
            )
            moments.append(total.moments())
        else:
            added = Moments()
            for result in results:
                part = result.moments[channel]
                added.add(part.count, part.mean, part.squares)
            moments.append(added)
    return moments
