"""How a run resumes when its workers start. It takes the first of these that exists:

1. The newest snapshot in the memory of any worker's node (`trainer.run.snapshot`). It must belong to the run's history, and
   be newer than the newest checkpoint. One worker sends it to all others.
2. The newest committed checkpoint (`trainer.run.checkpoint`). Newer checkpoints that do not belong to the run's history are
   removed: they were written by an attempt after a later attempt had started from an earlier step.
3. The initial weights that the config names with `init`, at step 0.
4. Random weights from the config's seed, at step 0.

A snapshot that is damaged, or from another run or config, is ignored. If the newest checkpoint is damaged, or from another
run, dataset or config, the run stops with UserError, because resuming from an older one would silently repeat work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.storage.store import Store
from trainer.config.schema import RunConfig
from trainer.run.checkpoint import check_state, load_optimizer, load_weights, newest_checkpoint
from trainer.run.run import Run, read_record
from trainer.run.snapshot import Rows, restore
from trainer.run.worker import Worker


@dataclass(frozen=True)
class ResumePoint:
    """Where training starts."""

    step: int  # steps that are done
    rows: Rows  # metrics of those steps that are not in the run folder yet


def resume(
    run: Run,
    worker: Worker,
    config: RunConfig,
    nodes: Sequence[int],
    fingerprint: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    begin: Callable[[], None],
) -> ResumePoint:
    """Load the newest state of a run into `model` and `optimizer`, as described above. Call it on every rank. Raises WorkerLost.

    Args:
        nodes: of each worker, see `trainer.run.snapshot.node_number`.
        fingerprint: of the dataset.
        begin: sets the initial weights (3.); random weights (4.) are what `model` has already.
    """
    checkpoint = _newest_checkpoint(run.store, worker)
    if checkpoint:
        earlier = read_record(run.store).fingerprints
        check_state(run.store, checkpoint, run, fingerprint, config, earlier)
    if snapshot := restore(run, worker, config, nodes, checkpoint, model, optimizer):
        return ResumePoint(*snapshot)
    if checkpoint:
        load_weights(run.store, checkpoint, model)
        load_optimizer(run.store, checkpoint, model, optimizer)
    else:
        begin()
    return ResumePoint(checkpoint, [])


def _newest_checkpoint(store: Store, worker: Worker) -> int:
    """Return the step of the newest checkpoint, 0 if there is none. Rank 0 reads it, so that all ranks agree."""
    step = torch.tensor(newest_checkpoint(store) if worker.rank == 0 else 0)
    worker.group.broadcast(step, source=0)
    return int(step)
