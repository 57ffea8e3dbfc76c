"""`micro_batch: auto`: how many samples a worker puts through at once is tried out before training.

Nothing of what is computed depends on it but rounding: the global batch stays, in more or fewer parts.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import UserError
from pipeline.manifest import Dataset
from trainer.device import autocast
from trainer.recipe import C
from trainer.run import Run, make_order

FIRST = 8  # samples, then twice as many, …
RUNS = 3  # that are timed, after one that is not
BETTER = 1.02  # times the rate before, or it has stopped growing
HEADROOM = 0.1  # of a GPU's memory, for decoding and fragments


def with_micro_batch(
    config: C,
    dataset: Dataset,
    run: Run,
    model: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    together: int = 1,
) -> C:
    """The config with its micro-batch, the same on every rank: tried out if it is auto. Call it on every rank.

    Args:
        model: what is trained. Its gradients are gone afterwards, nothing else of it is touched.
        forward: uint8[n, 3, h, w] on the device → something to be summed and differentiated, if the model is trained.
        together: micro-batches are multiples of it, see `trainer.loop.micro_batches`.

    UserError if not even `together` samples (FIRST, if that is more) fit the device's memory.
    """
    if config.micro_batch != "auto":
        return config
    order = make_order(config, dataset)
    most = len(order.lanes_of(run.rank, run.world_size)) * (order.global_batch // order.lanes)

    def trial(n: int) -> None:
        try:
            images = torch.zeros((n, 3, *config.model.size), dtype=torch.uint8, device=run.device)
            with autocast(config, run.device):
                loss = forward(images).sum()
            if loss.requires_grad:
                loss.backward()
        finally:  # it may have come half-way
            model.zero_grad(set_to_none=True)

    first = min(most, max(FIRST, together))
    try:
        reserve = _reserve(model, run)  # held while it is tried out
        found = torch.tensor(
            fastest(lambda n: _seconds(partial(trial, n), run.device), first, most), device=run.device
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"micro_batch auto: not even {first} samples fit the memory of {run.device}; a smaller model or image_size would"
        ) from None
    del reserve
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    if run.world_size > 1:
        dist.all_reduce(found, dist.ReduceOp.MIN)
    chosen = int(found) // together * together
    if run.rank == 0:
        run.on_event({"event": "micro_batch", "samples": chosen, "most": most})
    return config.model_copy(update={"micro_batch": chosen})


def fastest(seconds: Callable[[int], float], first: int, most: int) -> int:
    """How many of `first`, 2 · first, … `most` samples at once do most a second; of about equally fast ones the fewest.

    Args:
        seconds: that so many take; torch.OutOfMemoryError where they do not fit, which is raised here for `first` only.
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


def _reserve(model: nn.Module, run: Run) -> torch.Tensor | None:
    """What training takes of a GPU besides: AdamW's moments, DDP's buckets, and headroom."""
    if run.device.type != "cuda":
        return None
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    headroom = HEADROOM * torch.cuda.get_device_properties(run.device).total_memory
    size = int((2 + (run.world_size > 1)) * trained + headroom)
    return torch.empty(size, dtype=torch.uint8, device=run.device)
