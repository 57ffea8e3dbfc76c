"""Decide what happens after workers fail, and describe the failure to the user.

Depends on Ray's internals, as `cluster.elastic.scaling` does.
"""

from typing import Any

import ray
from ray.train import FailureConfig, TrainingFailedError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure

from cluster.runtime.session import import_error
from pipeline.errors import UserError

ANSWER_S = 5.0


class WorkersStopped(Exception):  # noqa: N818  # not an error
    """All workers stopped on request and saved their state."""


class RestartPolicy(FailurePolicy):
    """Restart all workers after a failure that could not be repaired in place (`cluster.elastic.worker_group`).

    Except for user errors, and for repeated failures without progress, see `Mailbox.count_failure`. Runs in Ray's controller
    process.
    """

    def __init__(self, mailbox: Any) -> None:
        super().__init__(FailureConfig(max_failures=-1))
        self.mailbox = mailbox

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        error = training_failed_error
        if workers_stopped(error):
            stopping = answer(self.mailbox.is_stopping.remote(), default=False)
            return FailureDecision.RAISE if stopping else FailureDecision.RETRY
        if find_user_error(error):
            return FailureDecision.RAISE
        goes_on = record_failure(self.mailbox, error, in_place=False)
        return FailureDecision.RETRY if goes_on else FailureDecision.RAISE


def record_failure(mailbox: Any, error: TrainingFailedError, in_place: bool) -> bool:
    """Record a failure in the run's events, and return whether the run goes on."""
    event = {"cause": describe(error), "in_place": in_place}
    # A lost node, or a start that timed out, says nothing about the next attempt: these failures are not counted.
    if _is_preemption_failure(error) or has_cause(error, WorkerGroupStartupTimeoutError):
        mailbox.add_event.remote({"event": "failure", **event, "again": True})
        return True
    return answer(mailbox.count_failure.remote(event), default=True)


def answer(reference: Any, default: bool) -> bool:
    """Return the answer of an actor on the driver's node; `default` if it does not answer in time."""
    try:
        return bool(ray.get(reference, timeout=ANSWER_S))
    except ray.exceptions.RayError:
        return default


def _causes(error: TrainingFailedError) -> list[BaseException]:
    """Return the exception of each failed worker and of the controller, each followed by its chain of causes."""
    found: list[BaseException] = []
    for failure in [
        *getattr(error, "worker_failures", {}).values(),
        getattr(error, "controller_failure", None),
    ]:
        cause: BaseException | None = failure
        while cause is not None:
            found.append(cause)
            inner = getattr(cause, "health_check_failure", None) or getattr(cause, "cause", None)
            cause = inner or cause.__cause__
    return found


def has_cause(error: TrainingFailedError, kind: type[BaseException]) -> bool:
    """Return whether an exception of type `kind` is among the causes of `error`."""
    return any(isinstance(cause, kind) for cause in _causes(error))


def workers_stopped(error: TrainingFailedError) -> bool:
    """Return whether the workers stopped on request, and did not fail."""
    return has_cause(error, WorkersStopped)


def find_user_error(error: TrainingFailedError) -> UserError | None:
    """Return the user error that stopped a worker; None if something else did."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return UserError(str(cause).strip())
        if explained := import_error(cause):
            return explained
    return None


def describe(error: TrainingFailedError) -> str:
    """Return the cause of a failure in one line.

    Workers that died or hang come first. Connection errors of the other workers are only a consequence.
    """
    if has_cause(error, WorkerGroupStartupTimeoutError):
        return "the workers did not start in time"
    if has_cause(error, WorkerGroupStartupFailedError):
        return "a worker died during startup"
    dead, others = [], []
    for rank, failure in getattr(error, "worker_failures", {}).items():
        cause = getattr(failure, "health_check_failure", None) or getattr(failure, "cause", None) or failure
        if isinstance(cause, ray.exceptions.RayActorError):
            dead.append(f"worker {rank} {'and its node ' if 'node has died' in str(cause) else ''}died")
        elif isinstance(cause, WorkerHealthCheckTimeoutError):
            dead.append(f"worker {rank} does not respond")
        elif _is_collective_failure(cause):
            others.append(f"worker {rank} lost the connection to another worker")
        else:
            others.append(f"worker {rank}: {_last_line(cause)}")
    return ", ".join(dead) or (others or [_last_line(error)])[0]


def is_infrastructure_failure(error: TrainingFailedError) -> bool:
    """Return whether a machine or the network failed, so that the traceback is of no use."""
    kinds = (ray.exceptions.RayActorError, WorkerHealthCheckTimeoutError, WorkerGroupStartupTimeoutError)
    return any(has_cause(error, kind) for kind in kinds)


def _is_collective_failure(error: BaseException) -> bool:
    """Return whether a collective operation failed. Survivors see this error, often before Ray notices a death."""
    return "gloo" in str(error) or "NCCL" in str(error)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
