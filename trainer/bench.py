"""How fast a training step is, what of the device it uses, and how it gets on with the loader."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.bench import ENDLESS, WARM_UP, measure_loader
from pipeline.decode import make_decoder
from pipeline.loader import AHEAD, Loader, TrainBatch
from pipeline.manifest import Dataset
from pipeline.spent import Spent
from pipeline.storage import open_store
from trainer.config import ModelConfig, PretrainConfig
from trainer.device import autocast, dtype_of
from trainer.laps import shares
from trainer.loop import wrapped
from trainer.mae import MAE
from trainer.masks import noise_of
from trainer.optim import adamw
from trainer.pretrain import pretrain_step
from trainer.run import Run, make_order

LEAST = 2  # steps that are timed, however long they take
WARM_STEPS = 2  # of which the first compiles, and AdamW takes its memory
BASELINE = "mask tokens in the encoder, 8 blocks"
# The paper's Table 2: how much faster than its baseline, by width of the encoder.
PAPER = {1024: {"8 blocks": 2.8, "1 block": 3.7}, 1280: {"8 blocks": 3.5, "1 block": 4.1}}
PEAK_SIDES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}  # of matrices
OnTime = Callable[[float], object]  # told of seconds as they pass


def table_2(model: ModelConfig) -> dict[str, ModelConfig]:
    """The paper's Table 2: mask tokens in the encoder or not, a decoder of 8 blocks or of 1."""
    of = {BASELINE: ("token", 8), "8 blocks": ("nothing", 8), "1 block": ("nothing", 1)}
    return {
        title: model.model_copy(update={"masked": masked, "decoder_depth": depth})
        for title, (masked, depth) in of.items()
    }


@dataclass(frozen=True)
class Bench:
    """A training step of a recipe, by itself: what `trainer.pretrain` trains with, on batches of its global batch."""

    config: PretrainConfig
    model: MAE
    trained: torch.nn.Module
    optimizer: torch.optim.Optimizer
    run: Run

    def step(self, batch: TrainBatch) -> torch.Tensor:
        return pretrain_step(self.trained, self.optimizer, batch, self.config, self.run)


def make_bench(config: PretrainConfig, device: torch.device) -> Bench:
    torch.manual_seed(0)
    run = Run(open_store("."), "benchmark", 1, device=device)
    model = MAE(config.model).to(device, dtype_of(config))
    return Bench(config, model, wrapped(model, config, run), adamw(model, config.optim), run)


def resident_batch(config: PretrainConfig, device: torch.device) -> TrainBatch:
    """A batch that is on the device already."""
    n = config.global_batch
    images = torch.randint(256, (n, 3, *config.model.size), dtype=torch.uint8, device=device)
    ids = torch.arange(n)
    return TrainBatch(images, ids, ids, torch.ones(n), {}, step=0, epoch=0, wait_s=0.0, spent=Spent())


def count_flops(model: ModelConfig) -> int:
    """Floating-point operations of an image's forward and backward pass: of its matrix products, a multiplication and an
    addition each, and none that are done twice to save memory."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mae = MAE(model)
        images = torch.empty(1, 3, *model.size, dtype=torch.uint8)
        mae(images, torch.empty(1, model.patches, dtype=torch.int64)).sum().backward()
    return counter.get_total_flops()


def matmul_peak(config: PretrainConfig, device: torch.device) -> float:
    """Operations a second of the fastest of a few products of square matrices, in the precision of the run's steps."""
    best = 0.0
    for side in PEAK_SIDES[device.type]:
        a, b = (torch.randn(side, side, device=device, dtype=dtype_of(config)) for _ in range(2))
        with autocast(config, device):
            product = torch.mm(a, b)  # casts
            a, b = a.to(product.dtype), b.to(product.dtype)
            seconds = min(_seconds(functools.partial(torch.mm, a, b), device) for _ in range(5))
        best = max(best, 2 * side**3 / seconds)
    return best


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    begin = time.perf_counter()
    act()
    wait_for(device)
    return time.perf_counter() - begin


def wait_for(device: torch.device) -> None:
    """Until it has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_step(
    config: PretrainConfig, device: torch.device, seconds: float, on_time: OnTime = lambda s: None
) -> dict[str, Any]:
    """Steps on a resident batch for about so many seconds: img/s, ms of the parts of a step, the device's memory, FLOPs.

    Milliseconds are of a step whose parts are waited for one by one, so their sum is a little more than a step takes.
    `peak_gb` is None on a CPU.
    """
    bench = make_bench(config, device)
    batch = resident_batch(config, device)
    begin = time.perf_counter()
    for _ in range(WARM_STEPS):
        bench.step(batch)
    wait_for(device)
    on_time(time.perf_counter() - begin)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rate = _rate(bench, itertools.repeat(batch), seconds, on_time)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    parts = _parts(bench, batch)
    flops = count_flops(config.model)
    return {
        "img_per_s": rate,
        **parts,
        "peak_gb": peak,
        "gflop_per_image": flops / 1e9,
        "tflop_per_s": rate * flops / 1e12,
    }


def _rate(bench: Bench, batches: Iterator[TrainBatch], seconds: float, on_time: OnTime) -> float:
    """Images a second of steps on batches, which take laps."""
    images, begin = 0, time.perf_counter()
    bench.run.laps.start(bench.run.device)
    before = begin
    for nth in itertools.count():
        if nth >= LEAST and before - begin > seconds:
            break
        batch = next(batches)
        bench.run.laps.lap("data_wait")
        bench.step(batch)
        images += len(batch.images)
        if nth % 8 == 0:
            wait_for(bench.run.device)  # or the host would queue steps for far longer than so many seconds
        now = time.perf_counter()
        on_time(now - before)
        before = now
    wait_for(bench.run.device)
    return images / (time.perf_counter() - begin)


def _parts(bench: Bench, batch: TrainBatch) -> dict[str, float]:
    """Milliseconds of forward, backward and optimizer, medians of a few steps in which each is waited for."""
    config, run = bench.config, bench.run
    found = []
    for _ in range(WARM_STEPS):
        ids = batch.sample_ids.to(run.device)
        times = [_now(run.device)]
        with autocast(config, run.device):
            noise = noise_of(config.model, config.seed, batch.epoch, ids)
            loss = bench.trained(batch.images[: config.at_once], noise[: config.at_once]).mean()
        times.append(_now(run.device))
        loss.backward()
        times.append(_now(run.device))
        bench.optimizer.step()
        bench.optimizer.zero_grad(set_to_none=True)
        times.append(_now(run.device))
        found.append([(b - a) * 1000 for a, b in itertools.pairwise(times)])
    names = ("forward_ms", "backward_ms", "optimizer_ms")
    return {name: statistics.median(row[i] for row in found) for i, name in enumerate(names)}


def _now(device: torch.device) -> float:
    wait_for(device)
    return time.perf_counter()


def measure_end_to_end(
    config: PretrainConfig,
    dataset: Dataset,
    device: torch.device,
    seconds: float,
    on_time: Callable[[str, float], object],
) -> dict[str, Any]:
    """The loader alone, the step alone, and both together, each for about so many seconds: img/s, and where the time goes.

    Args:
        config: with its order fixed; one worker does all of its global batch.
        on_time: told what is measured, and how many seconds that took since it was last told.
    """
    threads = config.data.threads or torch.get_num_threads()
    order = make_order(config, dataset)

    def make_loader() -> Loader:
        decoder = make_decoder(config.data.decoder, config.model.size, threads, device)
        return Loader(
            dataset, order, decoder, 0, 1, config.data.kept_part, config.data.crop_area,
            config.data.crops, config.data.flips,
        )  # fmt: skip

    taken = measure_loader(make_loader(), 0, seconds, functools.partial(on_time, "loader alone"))
    step = measure_step(config, device, seconds, functools.partial(on_time, "step alone"))
    bench = make_bench(config, device)
    loader = make_loader()
    # Other epochs, so that nothing is in memory because it was read just now.
    first = 2 * order.steps_per_epoch
    with closing(loader), closing(loader.steps(first, first + ENDLESS)) as steps:
        warm = functools.partial(on_time, "both")
        for _ in range(WARM_STEPS + AHEAD):
            bench.step(next(steps))
        _rate(bench, steps, WARM_UP * seconds, warm)
        both = _rate(bench, steps, seconds, warm)
        parts = shares(bench.run.laps.take())
    per_step = order.global_batch / taken.images
    spent = {name: part * per_step * 1000 for name, part in vars(taken.spent).items()}
    bound = "loader" if taken.img_per_s < step["img_per_s"] else "step"
    return {
        "loader": {
            "img_per_s": taken.img_per_s,
            "busy": taken.busy(threads),
            "thread_ms_per_step": spent,
            "threads": threads,
            "bad_samples": taken.bad,
        },
        "step": step,
        "both": {"img_per_s": both, "shares": parts},
        "bound": bound,
        "of_slower": both / min(taken.img_per_s, step["img_per_s"]),
    }
