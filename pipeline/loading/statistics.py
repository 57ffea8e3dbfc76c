"""Compute the mean and standard deviation of a dataset's pixels, see `pipeline.dataset.statistics`.

The result does not depend on how many tasks do the work: the samples are split into the same jobs, and the results of jobs are
added in the same order. Sums over 8-bit and 16-bit pixels are exact integers. Floats are summed as float64, by the mean and the
squared distances from it (Chan, Golub and LeVeque 1983), so that no digits cancel.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Ints
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.statistics import SCALES, Statistics
from pipeline.errors import UserError, why_undecodable
from pipeline.hashing import hash64
from pipeline.images.convert import convert, significant_bits, to_grey
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
class FloatMoments:
    """Number, mean and summed squared distance from the mean of floats."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add_values(self, values: Array) -> None:
        """Add values, float[n]."""
        if len(values):
            doubles = values.astype(np.float64)
            mean = float(doubles.mean())
            self.add(FloatMoments(len(values), mean, float(np.square(doubles - mean).sum())))

    def add(self, other: "FloatMoments") -> None:
        """Add the values of another one."""
        if not other.count:
            return
        total, distance = self.count + other.count, other.mean - self.mean
        self.mean += distance * other.count / total
        self.squares += other.squares + distance * distance * self.count * other.count / total
        self.count = total

    def mean_and_std(self) -> tuple[float, float]:
        return self.mean, math.sqrt(self.squares / self.count)


@dataclass
class IntegerMoments:
    """Number, sum and sum of squares of integers. Adding them is exact."""

    count: int = 0
    total: int = 0
    squares: int = 0

    def add_values(self, values: Array) -> None:
        """Add values, uint8[n] or uint16[n] with n < 2^31."""
        counts = np.bincount(values)
        numbers = np.arange(len(counts))
        self.count += len(values)
        self.total += int(counts @ numbers)
        self.squares += int(counts @ numbers**2)

    def add(self, other: "IntegerMoments") -> None:
        """Add the values of another one."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def mean_and_std(self) -> tuple[float, float]:
        # Division of Python's integers is correctly rounded.
        variance = (self.count * self.squares - self.total**2) / self.count**2
        return self.total / self.count, math.sqrt(variance)


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
    moments: list[
        Any
    ]  # FloatMoments or IntegerMoments of each channel; of 3 channels, also of the images converted to grey
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
    total = _new_moments(pixels)
    for result in results:
        for moments, part in zip(total, result.moments, strict=True):
            moments.add(part)
    scale = SCALES[pixels.dtype]
    found = [(mean / scale, std / scale) for mean, std in (moments.mean_and_std() for moments in total)]
    channels = found[: pixels.channels]
    statistics = Statistics(
        fingerprint=dataset.fingerprint,
        dtype=pixels.dtype,
        mean=tuple(mean for mean, _ in channels),
        std=tuple(std for _, std in channels),
        grey=found[-1] if len(found) > len(channels) else None,
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


def _new_moments(pixels: Pixels) -> list[Any]:
    kind = FloatMoments if pixels.dtype == "float32" else IntegerMoments
    return [kind() for _ in range(pixels.channels + (pixels.channels == 3))]


def sum_pixels(job: StatisticsJob) -> JobResult:
    """Sum the pixels of a job's images."""
    dataset = open_dataset(job.url, already_reached=True)
    result = JobResult(job.number, _new_moments(dataset.manifest.pixels))
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
    rows = max(BLOCK_PIXELS // image.shape[1], 1)
    for first in range(0, len(image), rows):
        block = image[first : first + rows]
        if block.shape[2] == 3:
            block = np.concatenate([block, to_grey(block)], axis=2)
        for channel, moments in enumerate(result.moments):
            moments.add_values(block[..., channel].ravel())
    result.images += 1
    result.pixels += image.shape[0] * image.shape[1]
