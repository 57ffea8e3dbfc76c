"""Measure the loader's throughput, and where its time goes.

After a warm-up, batches are taken as fast as the loader makes them; `StageTimes` tells what its threads did in that
time. For comparison, the floor is the throughput of one core that decodes crops from memory and does nothing else.
"""

import functools
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline.cpus import available_cores
from pipeline.dataset.dataset import Dataset
from pipeline.decode.decoder import DecoderName
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.loading.crops import random_flips, random_resized_crops
from pipeline.loading.loader import PREFETCH_BATCHES, Loader, TrainBatch
from pipeline.loading.order import Order
from pipeline.loading.readahead import read_samples
from pipeline.stage_times import StageTimes

WARM_UP = 0.25  # length of the warm-up, as a share of the measured time
# For the floor: at most so many images and bytes in memory, and images per call of the decoder.
FLOOR_IMAGES, FLOOR_BYTES, FLOOR_BATCH = 1024, 256 << 20, 64
BUSY = 0.6  # a stage that is busy for a smaller share of the time mostly waits for others
ENDLESS = 1 << 40  # steps
OnProgress = Callable[[float], object]  # called with the seconds that passed since the last call


@dataclass(frozen=True)
class Plan:
    """What to measure: each decoder on each dataset."""

    datasets: Sequence[tuple[Dataset, Order]]
    decoders: Sequence[DecoderName]
    threads: int  # of each decoder
    size: int  # height and width of the crops, pixels
    disk_cache: tuple[str, int] | None  # see `Loader`
    seconds: float  # of each measurement

    @property
    def total_s(self) -> float:
        """About how many seconds all measurements will take."""
        floors = len({dataset.fingerprint for dataset, _ in self.datasets})
        return (floors + len(self.datasets) * len(self.decoders) * (1 + WARM_UP)) * self.seconds


@dataclass(frozen=True)
class Measurement:
    """Batches that were taken as fast as the loader made them."""

    images: int
    seconds: float
    stage_times: StageTimes  # thread-seconds spent on these batches
    wait_s: float  # for batches: nearly all of `seconds`, unless the caller is slower than the loader
    bad: int  # distinct bad samples

    @property
    def img_per_s(self) -> float:
        return self.images / self.seconds

    def stages(self) -> dict[str, dict[str, float] | None]:
        """Microseconds of a thread per image in each stage, and the stage's share of the sum. None for resizing if the
        decoder does it together with decoding."""
        total = sum(asdict(self.stage_times).values())
        stages: dict[str, dict[str, float] | None] = {
            stage: {"us_per_image": seconds / self.images * 1e6, "share": seconds / total}
            for stage, seconds in asdict(self.stage_times).items()
        }
        return stages if self.stage_times.resize else stages | {"resize": None}

    def busy(self, threads: int) -> dict[str, float]:
        """Share of the time that the reading thread waited for storage, that it worked, and that the decoding threads
        (`threads` of them, on average) were busy.

        No thread is busy for more than the whole time. But batches that were taken may have been made before, during the
        warm-up, so the shares are scaled down if a thread's sum is above 1.
        """
        times = self.stage_times
        decoding = (times.decode + times.resize + times.copy) / threads
        whole = max(self.seconds, times.storage + times.read, decoding)
        return {
            "storage": times.storage / whole,
            "reading": times.read / whole,
            "decoding": decoding / whole,
        }


def bottleneck(busy: dict[str, float]) -> str | None:
    """The stage that limits the throughput, a key of `Measurement.busy`; None if stages wait for each other."""
    reader = busy["storage"] + busy["reading"]  # one thread does both
    if max(reader, busy["decoding"]) < BUSY:
        return None
    if busy["decoding"] >= reader:
        return "decoding"
    return "storage" if busy["storage"] > busy["reading"] else "reading"


def available_decoders() -> list[DecoderName]:
    """The decoders that can be used on this machine."""
    return [name for name in get_args(DecoderName) if name != "auto" and _is_available(name)]


def _is_available(name: DecoderName) -> bool:
    try:
        make_decoder(name, size=1, threads=1).close()
    except UserError:
        return False
    return True


def bench_loader(plan: Plan, on_progress: Callable[[str, float], object]) -> dict[str, Any]:
    """Measure each decoder on each dataset. Returns "datasets" and, for each of them and each decoder, one of "rows", as
    JSON values.

    Args:
        on_progress: called with the name of the measurement and the seconds that passed since the last call.
    """
    rows, datasets = [], []
    floors: dict[str, float] = {}  # by fingerprint: the same images may be in several stores
    for dataset, order in plan.datasets:
        if dataset.fingerprint not in floors:
            on_floor = functools.partial(on_progress, "one core alone")
            floors[dataset.fingerprint] = measure_floor(dataset, order, plan.size, plan.seconds, on_floor)
        floor = floors[dataset.fingerprint]
        datasets.append(_dataset(dataset, order, floor))
        for number, name in enumerate(plan.decoders):
            decoder = make_decoder(name, plan.size, plan.threads, pixels=dataset.manifest.pixels)
            loader = Loader(dataset, order, decoder, rank=0, world_size=1, disk_cache=plan.disk_cache)
            on_step = functools.partial(on_progress, f"{dataset.store.url}, {name}")
            # Each decoder gets an epoch of its own, so that it does not find in memory what the one before has read.
            measured = measure_loader(loader, number * order.steps_per_epoch, plan.seconds, on_step)
            # The JSON key of the decoder is "executor", as in results of earlier versions.
            rows.append({"store": dataset.store.url, "executor": name, **_row(measured, plan.threads, floor)})
    return {"datasets": datasets, "rows": rows}


def _dataset(dataset: Dataset, order: Order, floor: float) -> dict[str, Any]:
    return {
        "store": dataset.store.url,
        "fingerprint": dataset.fingerprint,
        "samples": dataset.samples,
        "shards": dataset.manifest.shards,
        "image_bytes": dataset.manifest.image_bytes,
        "lanes": order.lanes,
        "block": order.block,
        "one_core_img_per_s": floor,
    }


def _row(measured: Measurement, threads: int, floor: float) -> dict[str, Any]:
    busy = measured.busy(threads)
    return {
        "img_per_s": measured.img_per_s,
        "of_floor": measured.img_per_s / (floor * min(threads, available_cores())),
        "stages": measured.stages(),
        "busy": busy,
        "bound": bottleneck(busy),
        "bad_samples": measured.bad,
        "images": measured.images,
        "seconds": measured.seconds,
        "wait_s": measured.wait_s,
    }


def measure_loader(loader: Loader, start: int, seconds: float, on_progress: OnProgress) -> Measurement:
    """Measure a loader from step `start` on, for about `seconds` after a warm-up. Closes the loader."""
    with closing(loader), closing(loader.steps(start, start + ENDLESS)) as steps:
        _take(steps, WARM_UP * seconds, PREFETCH_BATCHES + 2, on_progress)
        return _take(steps, seconds, 1, on_progress)


def _take(steps: Iterator[TrainBatch], seconds: float, at_least: int, on_progress: OnProgress) -> Measurement:
    """Take batches for so many seconds, and at least so many batches."""
    images, stage_times, wait_s, bad = 0, StageTimes(), 0.0, set[int]()
    begin = before = time.perf_counter()
    while at_least > 0 or before - begin < seconds:
        batch = next(steps)
        at_least -= 1
        images += len(batch.images)
        stage_times += batch.stage_times
        wait_s += batch.wait_s
        bad.update(batch.sample_ids[list(batch.bad)].tolist())
        now = time.perf_counter()
        on_progress(now - before)
        before = now
    return Measurement(images, before - begin, stage_times, wait_s, len(bad))


def measure_floor(
    dataset: Dataset, order: Order, size: int, seconds: float, on_progress: OnProgress
) -> float:
    """Images per second of one thread that decodes and resizes crops of the first steps from memory.

    Raises UserError if none of them can be decoded.
    """
    steps = range(min(order.steps_per_epoch, -(-FLOOR_IMAGES // order.global_batch)))
    ids = np.concatenate([order.step_draws(step) for step in steps])[:FLOOR_IMAGES]
    fit = np.cumsum(dataset.locate(ids % dataset.samples).size) <= FLOOR_BYTES
    samples = read_samples(dataset, ids[: max(int(fit.sum()), 1)])
    boxes = random_resized_crops(order.seed, 0, samples.ids, samples.located.height, samples.located.width)
    flips = random_flips(order.seed, 0, samples.ids)
    batches = [slice(i, i + FLOOR_BATCH) for i in range(0, len(samples.ids), FLOOR_BATCH)]
    images = 0
    with closing(make_decoder("cpu", size, threads=1, pixels=dataset.manifest.pixels)) as decoder:
        decoder(samples.encoded[batches[0]], boxes[batches[0]], flips[batches[0]])  # warm-up
        begin = before = time.perf_counter()
        while before - begin < seconds:
            for here in batches:  # whole rounds only, so that all images count equally often
                decoded = decoder(samples.encoded[here], boxes[here], flips[here])
                images += len(decoded.images) - len(decoded.bad)
                now = time.perf_counter()
                on_progress(now - before)
                before = now
    if not images:
        raise UserError(
            f"{dataset.store.url}: none of {len(samples.ids)} samples can be decoded: run `maestream shards verify`"
        )
    return images / (before - begin)


def cpu_model() -> str:
    """The name of this machine's CPU."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "unknown CPU"
