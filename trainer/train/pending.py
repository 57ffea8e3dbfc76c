"""Steps whose losses are still on the device, and the rows of metrics that they become.

Reading a loss waits for the device, so the losses of several steps are read together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from trainer.run.step_timer import shares
from trainer.run.worker import Worker


@dataclass(frozen=True)
class PendingStep:
    """A step whose loss has not been read from the device."""

    step: int
    epoch: int
    lr: float
    wait_s: float  # seconds that it waited for data
    sample_ids: torch.Tensor  # int64[n], this worker's
    sums: torch.Tensor  # float64 on the device, see `trainer.train.step.train_step`


@dataclass(frozen=True)
class Losses:
    """Of each pending step, over all workers."""

    loss: list[float]
    bad: list[int]  # number of bad samples
    # The mean loss of the samples of each part of the dataset that the step has samples of; empty for a dataset without parts.
    by_part: list[dict[str, float]]


def read_losses(
    pending: list[PendingStep], global_batch: int, worker: Worker, part_names: Sequence[str] = ()
) -> Losses:
    """Return the global losses of the pending steps. Call it on every rank; all get the same."""
    sums = torch.stack([step.sums for step in pending])
    if worker.world_size > 1:
        dist.all_reduce(sums)
    per_part, counts = sums[:, 2:].tensor_split(2, dim=1)
    by_part = [
        {name: loss / n for name, loss, n in zip(part_names, *row, strict=True) if n}
        for row in zip(per_part.tolist(), counts.tolist(), strict=True)
    ]
    return Losses((sums[:, 0] / global_batch).tolist(), sums[:, 1].int().tolist(), by_part)


def metric_rows(
    pending: list[PendingStep],
    losses: Losses,
    seconds: float,
    global_batch: int,
    attempt: int,
    worker: Worker,
) -> list[dict[str, Any]]:
    """Make a row of metrics for each pending step. Call it on every rank.

    Args:
        losses: as `read_losses` returned them.
        seconds: the time that all pending steps took together. "time" in a row is the share of each part of a step, see
            `trainer.run.step_timer`.
    """
    time_shares = shares(worker.timer.take())
    rows: list[dict[str, Any]] = [
        {
            "attempt": attempt,
            "step": step.step,
            "epoch": step.epoch,
            "samples": (step.step + 1) * global_batch,
            "loss": loss,
            **{f"loss/{name}": value for name, value in by_part.items()},
            "lr": step.lr,
            "img_per_s": len(pending) * global_batch / seconds,
            "data_wait_s": step.wait_s,
            "step_s": seconds / len(pending),
            "time": time_shares,
            "bad_samples": bad_count,
            "world_size": worker.world_size,
        }
        for step, loss, bad_count, by_part in zip(
            pending, losses.loss, losses.bad, losses.by_part, strict=True
        )
    ]
    if worker.ledger:
        for row, ids in zip(rows, _gather_sample_ids(pending, worker), strict=True):
            row["sample_ids"] = ids
    return rows


def _gather_sample_ids(pending: list[PendingStep], worker: Worker) -> list[list[int]]:
    """Return the sample ids of each pending step, rank after rank."""
    own = torch.stack([step.sample_ids for step in pending]).to(worker.device)
    if worker.world_size == 1:
        return own.tolist()
    longest = torch.tensor(own.shape[1], device=worker.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padded = F.pad(own, (0, int(longest) - own.shape[1]), value=-1)  # some workers have a lane fewer
    parts = [torch.empty_like(padded) for _ in range(worker.world_size)]
    dist.all_gather(parts, padded)
    return [[i for i in ids if i >= 0] for ids in torch.cat(parts, dim=1).tolist()]
