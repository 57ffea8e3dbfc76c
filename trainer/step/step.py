"""One optimizer step: micro-batches, gradients and their sum over the workers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from pipeline.loading.loader import Batch, TrainBatch
from trainer.config.device import autocast, should_compile
from trainer.config.schema import RunConfig
from trainer.group.gradients import GradientSum
from trainer.run.worker import Worker


@dataclass(frozen=True)
class TrainedModel:
    """A model in training."""

    forward: nn.Module  # computes the model's output; compiled if the config says so
    gradients: GradientSum  # over the workers
    # Each micro-batch is filled up to so many samples with images of weight 0, so that compiled code has one shape at any world
    # size; None: it is not.
    rows: int | None = None


def train_step(
    trained: TrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    config: RunConfig,
    worker: Worker,
    losses: Callable[[Batch, Batch], torch.Tensor],
    multiple_of: int = 1,
) -> torch.Tensor:
    """Do one optimizer step on this worker's part of the global batch.

    Args:
        losses: computes the loss of each sample of a micro-batch, float[n]. It gets the micro-batch on the device, and the
            same on the host.
        multiple_of: see `micro_batches`.

    Returns float64[2] on the device: the weighted sum of all workers' losses, and the number of bad samples. With `Batch.parts`,
    float64[2 + 2 · names]: then follow the weighted sum for each name, and the number of samples.

    Raises WorkerLost, before anything but gradients has changed. Another worker may have done the step then.
    """
    parts = micro_batches(batch, trained.rows or config.micro_batch_size, multiple_of)
    total = torch.zeros((), dtype=torch.float64, device=worker.device)
    by_part = None if batch.parts is None else torch.zeros_like(batch.parts[0], device=worker.device)
    for rows in parts:
        on_host = rows_of(batch, rows, trained.rows)
        part = to_device(on_host, worker.device)
        worker.timer.mark("host_to_device")
        with autocast(config, worker.device):
            each = losses(part, on_host) * part.weights
            loss = each.sum()
        if rows is parts[-1]:
            trained.gradients.begin()
        (loss / config.global_batch).backward()
        worker.timer.mark("step")
        total += loss.detach()
        if by_part is not None and part.parts is not None:
            by_part += each.detach().double() @ part.parts
    trained.gradients.finish()
    bad = (batch.weights == 0).sum().to(worker.device, total.dtype, non_blocking=True)
    sums = torch.stack([total, bad])
    if by_part is not None and batch.parts is not None:
        sums = torch.cat([sums, by_part, batch.parts.sum(0).to(worker.device)])
    worker.group.all_reduce(sums)  # raises if a worker was lost in this step, see `trainer.group.group`
    worker.timer.mark("all_reduce" if worker.world_size > 1 else "step")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    worker.timer.mark("step")
    return sums


def micro_batches(batch: Batch, largest: int, multiple_of: int = 1) -> list[slice]:
    """Split a batch into micro-batches of at most `largest` samples. Each begins at a multiple of `multiple_of`."""
    size = largest // multiple_of * multiple_of
    return [slice(first, first + size) for first in range(0, len(batch.weights), size)]


def rows_of(batch: Batch, rows: slice, size: int | None = None) -> Batch:
    """Return some rows of a batch, not copied. If they are fewer than `size`, rows of zeros follow, which have weight 0."""

    def pick(tensor: torch.Tensor) -> torch.Tensor:
        part = tensor[rows]
        missing = 0 if size is None else size - len(part)
        return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing > 0 else part

    return _map(pick, batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device."""
    return _map(lambda tensor: tensor.to(device, non_blocking=True), batch)


def _map(change: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> Batch:
    images, labels, ids, weights = map(change, (batch.images, batch.labels, batch.sample_ids, batch.weights))
    draws, parts = (None if tensor is None else change(tensor) for tensor in (batch.draws, batch.parts))
    return Batch(images, labels, ids, weights, {}, batch.stage_times, draws, parts)


def wrap_for_training(model: nn.Module, config: RunConfig, worker: Worker) -> TrainedModel:
    """Prepare a model for training."""
    forward, rows = cast(nn.Module, model), None
    if should_compile(config, worker.device):
        forward, rows = cast(nn.Module, torch.compile(model, dynamic=False)), _static_rows(config)
    # Until a bucket of gradients is sent, the backward pass has hidden the sums of those before.
    gradients = GradientSum(model, worker.group, lambda: worker.timer.mark("step"))
    return TrainedModel(forward, gradients, rows)


def _static_rows(config: RunConfig) -> int:
    """Return the size of micro-batches at any world size: not more than a worker has if there are as many as possible."""
    assert config.data.lanes is not None
    per_lane = config.global_batch // config.data.lanes
    return min(config.micro_batch_size, config.data.lanes // config.workers.max * per_lane)
