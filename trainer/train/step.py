"""One optimizer step: micro-batches, gradients and their average over the workers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.loading.loader import Batch, TrainBatch
from trainer.config.device import autocast, should_compile
from trainer.config.schema import RunConfig
from trainer.run.worker import Worker


def train_step(
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    config: RunConfig,
    worker: Worker,
    losses: Callable[[Batch, slice], torch.Tensor],
    multiple_of: int = 1,
) -> torch.Tensor:
    """Do one optimizer step on this worker's part of the global batch.

    Args:
        trained: the model as `wrap_for_training` returned it.
        losses: computes the loss of each sample of a micro-batch, float[n], with `trained`. It gets the micro-batch, on the
            device, and its rows in `batch`.
        multiple_of: see `micro_batches`.

    Returns float64[2] on the device: the weighted sum of this worker's losses, and the number of its bad samples. With
    `Batch.parts`, float64[2 + 2 · names]: then follow the weighted sum for each name, and the number of samples.
    """
    parts = micro_batches(batch, config.micro_batch_size, multiple_of)
    total = torch.zeros((), dtype=torch.float64, device=worker.device)
    by_part = None if batch.parts is None else torch.zeros_like(batch.parts[0], device=worker.device)
    for rows in parts:
        part = to_device(batch, rows, worker.device)
        worker.timer.mark("host_to_device")
        # Gradients are averaged over the workers once, with the last micro-batch.
        accumulates = rows is not parts[-1] and worker.world_size > 1
        with _without_all_reduce(trained) if accumulates else nullcontext():
            with autocast(config, worker.device):
                each = losses(part, rows) * part.weights
                loss = each.sum()
            (loss * (worker.world_size / config.global_batch)).backward()
        worker.timer.mark("step" if accumulates or worker.world_size == 1 else "all_reduce")
        total += loss.detach()
        if by_part is not None and part.parts is not None:
            by_part += each.detach().double() @ part.parts
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    worker.timer.mark("step")
    bad = (batch.weights == 0).sum().to(worker.device, total.dtype, non_blocking=True)
    sums = torch.stack([total, bad])
    if by_part is None or batch.parts is None:
        return sums
    return torch.cat([sums, by_part, batch.parts.sum(0).to(worker.device)])


def micro_batches(batch: Batch, largest: int, multiple_of: int = 1) -> list[slice]:
    """Split a batch into micro-batches of at most `largest` samples. Each begins at a multiple of `multiple_of`."""
    size = largest // multiple_of * multiple_of
    return [slice(first, first + size) for first in range(0, len(batch.weights), size)]


def to_device(batch: Batch, rows: slice, device: torch.device) -> Batch:
    """Copy some rows of a batch to the device."""
    images, labels, ids, weights = (
        tensor[rows].to(device, non_blocking=True)
        for tensor in (batch.images, batch.labels, batch.sample_ids, batch.weights)
    )
    draws, parts = (
        None if tensor is None else tensor[rows].to(device, non_blocking=True)
        for tensor in (batch.draws, batch.parts)
    )
    return Batch(images, labels, ids, weights, {}, batch.stage_times, draws, parts)


def wrap_for_training(model: nn.Module, config: RunConfig, worker: Worker) -> nn.Module:
    """Return the module to call in training: it averages gradients over the workers, and is compiled if the config says so."""
    trained = model
    if worker.world_size > 1:
        trained = DistributedDataParallel(model, broadcast_buffers=False)
        group = trained.process_group

        def average(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            # Until here the backward pass has hidden the all-reduces of earlier buckets.
            worker.timer.mark("step")
            return allreduce_hook(group, bucket)

        trained.register_comm_hook(None, average)
    # Shapes are static: a full micro-batch, and the last one of a batch.
    return (
        cast(nn.Module, torch.compile(trained, dynamic=False))
        if should_compile(config, worker.device)
        else trained
    )


def _without_all_reduce(trained: nn.Module) -> AbstractContextManager[None]:
    """Accumulate gradients locally. Only for what `wrap_for_training` returns with several workers."""
    return cast(DistributedDataParallel, trained).no_sync()
