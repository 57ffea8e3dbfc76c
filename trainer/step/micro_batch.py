"""`micro_batch: auto`: the fastest micro-batch that fits the device's memory, measured before training.

It does not change the result but for rounding: the global batch stays the same, in more or fewer parts.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from pipeline.text import plural
from trainer.config.device import autocast
from trainer.config.recipe import ConfigT
from trainer.run.run import make_order
from trainer.run.worker import Callbacks, Worker

FIRST = 8  # samples in the first trial; each trial doubles them
RUNS = 3  # timed runs of a trial, after one warm-up
BETTER = 1.02  # a larger micro-batch must be this many times faster, else the search ends
HEADROOM = 0.1  # share of the GPU's memory that is kept free, for decoding and fragmentation


def with_micro_batch(
    config: ConfigT,
    dataset: Dataset,
    worker: Worker,
    callbacks: Callbacks,
    model: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    multiple_of: int = 1,
) -> ConfigT:
    """Return the config with micro_batch as a number; auto is measured.

    Each worker measures for itself, since a worker may join later. It does not matter if they find different numbers.

    Args:
        model: the model in training. Its gradients are cleared; nothing else of it changes.
        forward: maps images, pixels [n, c, h, w] on the device, to a tensor whose sum is differentiated if it requires
            gradients.
        multiple_of: the micro-batch is a multiple of it, see `trainer.step.step.micro_batches`.

    Raises UserError if the first trial does not fit the device's memory: `multiple_of` or FIRST samples, whichever is more.
    """
    if config.micro_batch != "auto":
        return config
    order = make_order(config, dataset)
    workers = config.workers.max if worker.group.changes else worker.world_size
    most = len(order.lanes_of(0, workers)) * (order.global_batch // order.lanes)

    def trial(n: int) -> None:
        try:
            images = torch.zeros(
                (n, config.model.channels, *config.model.size), dtype=torch.uint8, device=worker.device
            )
            with autocast(config, worker.device):
                loss = forward(images).sum()
            if loss.requires_grad:
                loss.backward()
        finally:  # also if memory ran out in the backward pass
            model.zero_grad(set_to_none=True)

    first = min(most, max(FIRST, multiple_of))
    try:
        reserve = _reserve(model, worker)  # held during the trials
        found = fastest(lambda n: _seconds(partial(trial, n), worker.device), first, most)
    except torch.OutOfMemoryError:
        raise UserError(
            f"micro_batch=auto: {plural(first, 'sample')} cannot fit in the memory of {worker.device}: use a smaller model or image_size"
        ) from None
    del reserve
    if worker.device.type == "cuda":
        torch.cuda.empty_cache()
    chosen = found // multiple_of * multiple_of
    if worker.reports:
        callbacks.on_event({"event": "micro_batch", "samples": chosen, "most": most})
    return config.model_copy(update={"micro_batch": chosen})


def fastest(seconds: Callable[[int], float], first: int, most: int) -> int:
    """Return the fastest micro-batch of `first`, 2 · first, … and `most` samples; the smallest of about equally fast ones.

    Args:
        seconds: measures a micro-batch of so many samples. It may raise torch.OutOfMemoryError, which ends the search, and is
            raised here if already `first` samples do not fit.
    """
    best, rate = 0, 0.0
    n = first
    while True:
        try:
            now = n / seconds(n)
        except torch.OutOfMemoryError:
            if not best:
                raise
            return best
        if now < rate * BETTER:
            return best
        best, rate = n, now
        if n == most:
            return best
        n = min(2 * n, most)


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    act()
    begin = now()
    for _ in range(RUNS):
        act()
    return (now() - begin) / RUNS


def _reserve(model: nn.Module, worker: Worker) -> torch.Tensor | None:
    """Allocate what training needs of a GPU besides: AdamW's moments, buckets of gradients, and headroom. None on a CPU."""
    if worker.device.type != "cuda":
        return None
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    headroom = HEADROOM * torch.cuda.get_device_properties(worker.device).total_memory
    size = int((2 + worker.group.several) * trained + headroom)
    return torch.empty(size, dtype=torch.uint8, device=worker.device)
