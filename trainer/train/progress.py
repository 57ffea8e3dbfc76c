"""What every worker knows of a run's progress, and how workers that form a group come to know the same."""

from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch

from trainer.run.snapshot import Rows
from trainer.run.transfer import from_bytes, load_state, send, state_of, to_bytes
from trainer.run.worker import Worker
from trainer.train.pending import PendingStep
from trainer.train.task import Task

PROGRESS = "progress"  # name of the tensor with pending steps and rows: JSON as uint8


@dataclass
class Progress:
    """How far a worker is. All workers of a group have the same."""

    step: int = -1  # steps that are done; −1: this worker has no state yet
    pending: list[PendingStep] = field(default_factory=list)  # done, but their losses have not been read
    unsaved: Rows = field(default_factory=list)  # rows of metrics that may not be in the run folder yet
    saved: int = 0  # steps in the newest checkpoint, as far as is known
    bad: int = 0  # bad samples in steps that were read since the workers last exchanged them

    def add(self, step: PendingStep, saved: int) -> None:
        """Add a step that is done. `saved`: steps in the newest checkpoint."""
        self.step, self.saved = step.step + 1, saved
        self.pending.append(step)

    def read(self, rows: Rows) -> None:
        """Replace pending steps by their rows of metrics, and forget those that a checkpoint has."""
        self.pending.clear()
        self.bad += sum(row["bad_samples"] for row in rows)
        self.unsaved = [row for row in self.unsaved if row["step"] >= self.saved] + rows


class Standing(NamedTuple):
    """What workers tell each other when they form a group."""

    step: int  # as `Progress.step`
    unsettled: int  # what is left to do together after this step, see `trainer.train.loop`
    node: int  # see `trainer.run.snapshot.node_number`


def exchange(own: Standing, worker: Worker) -> list[Standing]:
    """Return the standing of each worker, by rank. Call it on every rank. Raises WorkerLost."""
    return [Standing(*row.tolist()) for row in worker.group.all_gather(torch.tensor(own))]


def catch_up(progress: Progress, standings: list[Standing], task: Task, worker: Worker) -> None:
    """Give the state of the worker that is furthest to those that are behind it. Call it on every rank. Raises WorkerLost.

    A worker is behind if it has just joined. Or if it lost the connection in the middle of a step that another has done: then
    it is one step behind.
    """
    steps = [standing.step for standing in standings]
    best = max(steps)
    if min(steps) == best:
        return
    source = steps.index(best)
    state = {}
    if worker.rank == source:
        state = state_of(task.model, task.optimizer) | {PROGRESS: _pack(progress)}
    state = send(state, source, worker)
    if progress.step < best:
        others = _unpack(state.pop(PROGRESS), worker)
        load_state(task.model, task.optimizer, state)
        vars(progress).update(vars(others))  # the same object: others refer to it


def _pack(progress: Progress) -> torch.Tensor:
    pending = [
        {**asdict(replace(step, sums=torch.empty(0))), "sums": step.sums.tolist()}
        for step in progress.pending
    ]
    return to_bytes(vars(progress) | {"pending": pending})


def _unpack(data: torch.Tensor, worker: Worker) -> Progress:
    tree = from_bytes(data)
    pending = [
        PendingStep(**{**step, "sums": torch.tensor(step["sums"], dtype=torch.float64, device=worker.device)})
        for step in tree["pending"]
    ]
    return Progress(**tree | {"pending": pending})
