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

    attempt: int
    world_size: int
    step: int
    epoch: int
    lr: float
    wait_s: float  # seconds that it waited for data
    sums: torch.Tensor  # float64 on the device, see `trainer.step.step.train_step`
    sample_ids: list[int] | None  # of all workers, rank after rank; None without a ledger


@dataclass(frozen=True)
class Losses:
    """Of each pending step, over all workers."""

    loss: list[float]
    bad: list[int]  # number of bad samples
    # The mean loss of the samples of each part of the dataset that the step has samples of; empty for a dataset without parts.
    by_part: list[dict[str, float]]


def read_losses(pending: list[PendingStep], global_batch: int, part_names: Sequence[str] = ()) -> Losses:
    """Return the losses of the pending steps."""
    sums = torch.stack([step.sums for step in pending])
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
    worker: Worker,
) -> list[dict[str, Any]]:
    """Make a row of metrics for each pending step.

    Args:
        losses: as `read_losses` returned them.
        seconds: the time that all pending steps took together. "time" in a row is the share of each part of a step, see
            `trainer.run.step_timer`.
    """
    time_shares = shares(worker.timer.take())
    rows: list[dict[str, Any]] = [
        {
            "attempt": step.attempt,
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
            "world_size": step.world_size,
            **({} if step.sample_ids is None else {"sample_ids": step.sample_ids}),
        }
        for step, loss, bad_count, by_part in zip(
            pending, losses.loss, losses.bad, losses.by_part, strict=True
        )
    ]
    return rows


def gather_sample_ids(own: torch.Tensor, worker: Worker) -> list[int]:
    """Return the sample ids of a step, rank after rank. Call it on every rank. `own`: int64[n], this worker's."""
    longest = torch.tensor(len(own))
    worker.group.all_reduce(longest, dist.ReduceOp.MAX)
    padded = F.pad(own, (0, int(longest) - len(own)), value=-1)  # some workers have a lane fewer
    return [i for i in torch.cat(worker.group.all_gather(padded)).tolist() if i >= 0]
