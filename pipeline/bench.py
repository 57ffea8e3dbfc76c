"""How fast batches come and where their time goes, beside what one core does at best.

A loader's steps are taken as fast as they come, after a while to warm up; `Spent` says what its threads did
meanwhile. The floor is what is left when all but the pixels is free: one core that decodes crops from memory.
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

from pipeline.augment import random_flips, random_resized_crops
from pipeline.cores import available_cores
from pipeline.decode import DecoderName, make_decoder
from pipeline.errors import UserError
from pipeline.loader import AHEAD, Loader, TrainBatch
from pipeline.manifest import Dataset
from pipeline.order import Order
from pipeline.reader import read_samples
from pipeline.spent import Spent

WARM_UP = 0.25  # of the time that is measured, before it
FLOOR_IMAGES, FLOOR_BYTES, FLOOR_BATCH = 1024, 256 << 20, 64  # at most, and at a time
BUSY = 0.6  # whoever is busy for less of the time mostly waits for others
ENDLESS = 1 << 40  # steps
OnTime = Callable[[float], object]  # told of seconds as they pass


@dataclass(frozen=True)
class Plan:
    """What is measured: each of the executors on each of the datasets, for so many seconds each."""

    datasets: Sequence[tuple[Dataset, Order]]
    executors: Sequence[DecoderName]
    threads: int
    size: int  # of a crop
    cache: tuple[str, int] | None  # see `Loader`
    seconds: float

    @property
    def total_s(self) -> float:
        """How long it will take, about."""
        floors = len({dataset.fingerprint for dataset, _ in self.datasets})
        return (floors + len(self.datasets) * len(self.executors) * (1 + WARM_UP)) * self.seconds


@dataclass(frozen=True)
class Taken:
    """Steps of a loader, taken as fast as they came."""

    images: int
    seconds: float
    spent: Spent  # on them
    wait_s: float  # for them: nearly all of the time, or whoever takes them is too slow
    bad: int  # distinct samples among them

    @property
    def img_per_s(self) -> float:
        return self.images / self.seconds

    def stages(self) -> dict[str, dict[str, float] | None]:
        """Thread-time an image of each stage, and its share of the sum: the shares sum to 1. None for resizing
        that is done in one with decoding."""
        total = sum(asdict(self.spent).values())
        stages: dict[str, dict[str, float] | None] = {
            stage: {"us_per_image": seconds / self.images * 1e6, "share": seconds / total}
            for stage, seconds in asdict(self.spent).items()
        }
        return stages if self.spent.resize else stages | {"resize": None}

    def busy(self, threads: int) -> dict[str, float]:
        """For which share of the time the reading thread waited for storage and read, and all of the decoding
        threads were at it."""
        spent, decoding = self.spent, self.spent.decode + self.spent.resize + self.spent.copy
        return {
            "storage": spent.storage / self.seconds,
            "reading": spent.read / self.seconds,
            "decoding": decoding / (threads * self.seconds),
        }


def bound(busy: dict[str, float]) -> str | None:
    """What the rate hangs on, of the keys of `Taken.busy`; None where stages wait for each other."""
    reader = busy["storage"] + busy["reading"]  # one thread, which does either
    if max(reader, busy["decoding"]) < BUSY:
        return None
    if busy["decoding"] >= reader:
        return "decoding"
    return "storage" if busy["storage"] > busy["reading"] else "reading"


def executors_here() -> list[DecoderName]:
    """The executors that exist on this machine."""
    return [name for name in get_args(DecoderName) if name != "auto" and _exists(name)]


def _exists(name: DecoderName) -> bool:
    try:
        make_decoder(name, size=1, threads=1).close()
    except UserError:
        return False
    return True


def bench_loader(plan: Plan, on_time: Callable[[str, float], object]) -> dict[str, Any]:
    """A row for each dataset and executor, and what is known of the datasets: nothing that JSON does not know.

    Args:
        on_time: told what is measured, and how many seconds that took since it was last told.
    """
    rows, datasets = [], []
    floors: dict[str, float] = {}  # of each fingerprint: the same images may lie in several stores
    for dataset, order in plan.datasets:
        if dataset.fingerprint not in floors:
            on_floor = functools.partial(on_time, "one core alone")
            floors[dataset.fingerprint] = measure_floor(dataset, order, plan.size, plan.seconds, on_floor)
        floor = floors[dataset.fingerprint]
        datasets.append(_dataset(dataset, order, floor))
        for nth, name in enumerate(plan.executors):
            decoder = make_decoder(name, plan.size, plan.threads)
            loader = Loader(dataset, order, decoder, rank=0, world_size=1, cache=plan.cache)
            on_step = functools.partial(on_time, f"{dataset.store.url}, {name}")
            # Each in an epoch of its own, or it would find in memory what the one before has read.
            taken = measure_loader(loader, nth * order.steps_per_epoch, plan.seconds, on_step)
            rows.append(
                {"store": dataset.store.url, "executor": name, **_numbers(taken, plan.threads, floor)}
            )
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


def _numbers(taken: Taken, threads: int, floor: float) -> dict[str, Any]:
    busy = taken.busy(threads)
    return {
        "img_per_s": taken.img_per_s,
        "of_floor": taken.img_per_s / (floor * min(threads, available_cores())),
        "stages": taken.stages(),
        "busy": busy,
        "bound": bound(busy),
        "bad_samples": taken.bad,
        "images": taken.images,
        "seconds": taken.seconds,
        "wait_s": taken.wait_s,
    }


def measure_loader(loader: Loader, start: int, seconds: float, on_time: OnTime) -> Taken:
    """The steps of a loader from `start` on, for about so many seconds after WARM_UP of them. Closes it."""
    with closing(loader), closing(loader.steps(start, start + ENDLESS)) as steps:
        _take(steps, WARM_UP * seconds, AHEAD + 2, on_time)
        return _take(steps, seconds, 1, on_time)


def _take(steps: Iterator[TrainBatch], seconds: float, at_least: int, on_time: OnTime) -> Taken:
    """Batches for so many seconds, and so many batches at least."""
    images, spent, wait_s, bad = 0, Spent(), 0.0, set[int]()
    begin = before = time.perf_counter()
    while at_least > 0 or before - begin < seconds:
        batch = next(steps)
        at_least -= 1
        images += len(batch.images)
        spent += batch.spent
        wait_s += batch.wait_s
        bad.update(batch.sample_ids[list(batch.bad)].tolist())
        now = time.perf_counter()
        on_time(now - before)
        before = now
    return Taken(images, before - begin, spent, wait_s, len(bad))


def measure_floor(dataset: Dataset, order: Order, size: int, seconds: float, on_time: OnTime) -> float:
    """img/s of one thread that decodes and resizes crops of the first steps from memory, and does nothing else.

    UserError if none of them decodes.
    """
    steps = range(min(order.steps_per_epoch, -(-FLOOR_IMAGES // order.global_batch)))
    ids = np.concatenate([order.step_ids(step) for step in steps])[:FLOOR_IMAGES]
    fit = np.cumsum(dataset.locate(ids).size) <= FLOOR_BYTES
    samples = read_samples(dataset, ids[: max(int(fit.sum()), 1)])
    boxes = random_resized_crops(order.seed, 0, samples.ids, samples.located.height, samples.located.width)
    flips = random_flips(order.seed, 0, samples.ids)
    batches = [slice(i, i + FLOOR_BATCH) for i in range(0, len(samples.ids), FLOOR_BATCH)]
    images = 0
    with closing(make_decoder("cpu", size, threads=1)) as decoder:
        decoder(samples.encoded[batches[0]], boxes[batches[0]], flips[batches[0]])  # wakes the core
        begin = before = time.perf_counter()
        while before - begin < seconds:
            for here in batches:  # all of them equally often: the last round may end late
                decoded = decoder(samples.encoded[here], boxes[here], flips[here])
                images += len(decoded.images) - len(decoded.bad)
                now = time.perf_counter()
                on_time(now - before)
                before = now
    if not images:
        raise UserError(
            f"{dataset.store.url}: none of {len(samples.ids)} samples decodes; run `maestream shards verify`"
        )
    return images / (before - begin)


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "unknown CPU"
