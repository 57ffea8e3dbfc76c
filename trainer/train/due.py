"""What is due after a step of training, as one pure function."""

from dataclasses import dataclass

from trainer.config.schema import RunConfig
from trainer.group.requests import Request


@dataclass(frozen=True)
class Schedule:
    """Length of a run, and steps between two of each thing that is due regularly; None: it never is."""

    total_steps: int
    log_every: int
    checkpoint_every: int | None
    evaluate_every: int | None


def make_schedule(config: RunConfig, steps_per_epoch: int, evaluate_every: float | None) -> Schedule:
    """Make the schedule of a run. `evaluate_every` is in epochs, None for a task without evaluation."""
    return Schedule(
        total_steps=max(1, round(config.epochs * steps_per_epoch)),
        log_every=config.log_every,
        checkpoint_every=config.checkpoint.every_steps,
        evaluate_every=None if evaluate_every is None else max(1, round(evaluate_every * steps_per_epoch)),
    )


@dataclass(frozen=True)
class Due:
    """What is due after a step, in this order. `meet`, `evaluate`, `stop` and `finished` are the same on every rank."""

    log: bool  # read losses from the device and write metrics; true whenever anything else is due
    meet: bool  # exchange what the workers know of bad samples; true whenever `evaluate`, `stop` or `finished` is
    evaluate: bool
    checkpoint: bool  # rank 0 writes checkpoints, and only rank 0 knows when one is overdue
    picture: bool
    stop: bool  # stop before the run is finished
    snapshot: bool
    finished: bool  # it was the run's last step


def due_after(
    step: int, schedule: Schedule, request: Request, snapshot_due: bool, checkpoint_overdue: bool
) -> Due:
    """Decide what is due after `step` steps.

    Args:
        request: the request that all ranks have agreed on.
        snapshot_due: whether it is time for this node's snapshot.
        checkpoint_overdue: whether the newest checkpoint is too old. The checkpoint waits for the next step that logs.
    """
    finished = step == schedule.total_steps
    stop = request is Request.SAVE and not finished
    evaluate = schedule.evaluate_every is not None and (
        finished or (step % schedule.evaluate_every == 0 and not stop)
    )
    checkpoint = finished or _is_multiple(step, schedule.checkpoint_every)
    snapshot = snapshot_due and not finished and not stop  # a stop takes a last snapshot anyway
    meet = step % schedule.log_every == 0 or checkpoint or evaluate or stop
    log = meet or snapshot
    checkpoint = checkpoint or (log and checkpoint_overdue)
    return Due(log, meet, evaluate, checkpoint, checkpoint, stop, snapshot, finished)


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
