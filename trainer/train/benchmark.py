"""Benchmark of the training step: alone, beside the loader, and against the device's peak."""

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

from pipeline.dataset.dataset import Dataset
from pipeline.decode.factory import make_decoder
from pipeline.loading.benchmark import ENDLESS, WARM_UP, measure_loader
from pipeline.loading.loader import PREFETCH_BATCHES, Loader, TrainBatch
from pipeline.stage_times import StageTimes
from trainer.config.device import autocast, weight_dtype
from trainer.config.model_schema import ModelConfig
from trainer.config.schema import PretrainConfig
from trainer.group.group import Group
from trainer.models.mae import MAE
from trainer.models.masking import masking_noise
from trainer.models.pixels import check_channels, images_taken
from trainer.run.run import make_order
from trainer.run.step_timer import shares
from trainer.run.worker import Worker
from trainer.step.optim import adamw
from trainer.step.step import TrainedModel, wrap_for_training
from trainer.train.pretrain import pretrain_step

MIN_STEPS = 2  # timed steps, at least
WARM_UP_STEPS = 2  # in the first, the model is compiled and AdamW allocates its state
BASELINE = "mask tokens in the encoder, 8 blocks"
# Speed-up over the baseline in the paper's Table 2, by width of the encoder.
PAPER = {1024: {"8 blocks": 2.8, "1 block": 3.7}, 1280: {"8 blocks": 3.5, "1 block": 4.1}}
PEAK_SIDES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}  # sides of the matrices of `matmul_peak`
OnTime = Callable[[float], object]  # progress: gets the seconds since its last call


def table_2(model: ModelConfig) -> dict[str, ModelConfig]:
    """Return the models of the paper's Table 2: mask tokens in the encoder or not, a decoder of 8 blocks or 1."""
    variants = {BASELINE: ("token", 8), "8 blocks": ("nothing", 8), "1 block": ("nothing", 1)}
    return {
        title: model.model_copy(update={"masked": masked, "decoder_depth": depth})
        for title, (masked, depth) in variants.items()
    }


@dataclass(frozen=True)
class Bench:
    """The training step of a pre-training recipe, without a run. Batches have the size of its global batch."""

    config: PretrainConfig
    model: MAE
    trained: TrainedModel
    optimizer: torch.optim.Optimizer
    worker: Worker

    def step(self, batch: TrainBatch) -> torch.Tensor:
        return pretrain_step(self.trained, self.optimizer, batch, self.config, self.worker)


def make_bench(config: PretrainConfig, device: torch.device) -> Bench:
    torch.manual_seed(0)
    worker = Worker(Group(device))
    model = MAE(config.model).to(device, weight_dtype(config))
    return Bench(config, model, wrap_for_training(model, config, worker), adamw(model, config.optim), worker)


def resident_batch(config: PretrainConfig, device: torch.device) -> TrainBatch:
    """Make a batch of random images whose images are already on the device."""
    n = config.global_batch
    shape = (n, config.model.channels, *config.model.size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    ids = torch.arange(n)
    return TrainBatch(
        images, ids, ids, torch.ones(n), {}, step=0, epoch=0, wait_s=0.0, stage_times=StageTimes()
    )


def count_flops(model: ModelConfig) -> int:
    """Count the floating-point operations of the forward and backward pass of one image.

    Counts matrix products, with 2 operations per multiply-add; recomputation to save memory is not counted.
    """
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mae = MAE(model)
        images = torch.empty(1, model.channels, *model.size, dtype=torch.uint8)
        mae(images, torch.empty(1, model.num_patches, dtype=torch.int64)).sum().backward()
    return counter.get_total_flops()


def matmul_peak(config: PretrainConfig, device: torch.device) -> float:
    """Measure the peak rate of matrix products in the precision of training, in FLOP/s: the fastest of PEAK_SIDES."""
    best = 0.0
    for side in PEAK_SIDES[device.type]:
        a, b = (torch.randn(side, side, device=device, dtype=weight_dtype(config)) for _ in range(2))
        with autocast(config, device):
            product = torch.mm(a, b)  # casts to the precision of autocast
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
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_step(
    config: PretrainConfig, device: torch.device, seconds: float, on_time: OnTime = lambda s: None
) -> dict[str, Any]:
    """Measure training steps on a batch in the device's memory, for about `seconds` seconds.

    Returns img_per_s; forward_ms, backward_ms and optimizer_ms, whose sum is a little more than a step takes, because each
    part is waited for; peak_gb, the peak memory of the device in GB (10^9 bytes), None on a CPU; gflop_per_image and tflop_per_s.
    """
    bench = make_bench(config, device)
    batch = resident_batch(config, device)
    begin = time.perf_counter()
    for _ in range(WARM_UP_STEPS):
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
    """Measure images per second of steps on batches. `bench.worker.timer` measures their parts."""
    images, begin = 0, time.perf_counter()
    bench.worker.timer.start(bench.worker.device)
    before = begin
    for nth in itertools.count():
        if nth >= MIN_STEPS and before - begin > seconds:
            break
        batch = next(batches)
        bench.worker.timer.mark("data_wait")
        bench.step(batch)
        images += len(batch.images)
        if nth % 8 == 0:
            wait_for(bench.worker.device)  # else the host queues steps that take far longer than `seconds`
        now = time.perf_counter()
        on_time(now - before)
        before = now
    wait_for(bench.worker.device)
    return images / (time.perf_counter() - begin)


def _parts(bench: Bench, batch: TrainBatch) -> dict[str, float]:
    """Measure milliseconds of forward pass, backward pass and optimizer: medians of a few steps, waiting for each part."""
    config, worker = bench.config, bench.worker
    found = []
    for _ in range(WARM_UP_STEPS):
        ids = batch.sample_ids.to(worker.device)
        times = [_now(worker.device)]
        with autocast(config, worker.device):
            noise = masking_noise(config.model, config.seed, batch.epoch, ids)
            loss = bench.trained.forward(
                batch.images[: config.micro_batch_size], noise[: config.micro_batch_size]
            ).mean()
        times.append(_now(worker.device))
        loss.backward()
        times.append(_now(worker.device))
        bench.optimizer.step()
        bench.optimizer.zero_grad(set_to_none=True)
        times.append(_now(worker.device))
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
    """Measure the loader alone, the step alone, and both together, each for about `seconds` seconds.

    Returns img/s of each and where the time goes; "bound" names the slower part, and "of_slower" is the rate of both
    together divided by the rate of the slower part alone.

    Args:
        config: as `trainer.run.run.fix_order` returns it; one worker trains all of the global batch.
        on_time: progress: gets what is measured, and the seconds since its last call.
    """
    threads = config.data.threads or torch.get_num_threads()
    order = make_order(config, dataset)
    check_channels(config.model, dataset)
    pixels = images_taken(config.model, dataset.manifest.pixels)

    def make_loader() -> Loader:
        decoder = make_decoder(config.data.decoder, config.model.size, threads, device, pixels)
        return Loader(
            dataset, order, decoder, 0, 1, config.data.disk_cache, config.data.crop_area,
            config.data.crops, config.data.flips,
        )  # fmt: skip

    loaded = measure_loader(make_loader(), 0, seconds, functools.partial(on_time, "loader alone"))
    step = measure_step(config, device, seconds, functools.partial(on_time, "step alone"))
    bench = make_bench(config, device)
    loader = make_loader()
    # Other epochs than the loader's benchmark, so that their samples are not in the page cache from there.
    first = 2 * order.steps_per_epoch
    with closing(loader), closing(loader.steps(first, first + ENDLESS)) as steps:
        warm = functools.partial(on_time, "both")
        for _ in range(WARM_UP_STEPS + PREFETCH_BATCHES):
            bench.step(next(steps))
        _rate(bench, steps, WARM_UP * seconds, warm)
        both = _rate(bench, steps, seconds, warm)
        parts = shares(bench.worker.timer.take())
    per_step = order.global_batch / loaded.images
    spent = {name: part * per_step * 1000 for name, part in vars(loaded.stage_times).items()}
    bound = "loader" if loaded.img_per_s < step["img_per_s"] else "step"
    return {
        "loader": {
            "img_per_s": loaded.img_per_s,
            "busy": loaded.busy(threads),
            "thread_ms_per_step": spent,
            "threads": threads,
            "bad_samples": loaded.bad,
        },
        "step": step,
        "both": {"img_per_s": both, "shares": parts},
        "bound": bound,
        "of_slower": both / min(loaded.img_per_s, step["img_per_s"]),
    }
