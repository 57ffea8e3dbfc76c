"""What Ray Train is told to do after a failure, and what a person is told of it. Leans on the insides of Ray, as
`cluster.elastic` does."""

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

from pipeline.errors import UserError

HOPELESS = 3  # so many failures, with no attempt between them that began further on, stop a run


class Left(Exception):  # noqa: N818  # it is no error
    """All workers have left, with their work saved."""


class StopWhenHopeless(FailurePolicy):
    """Start the workers again after any failure, but for those that a person has to mend, and those that come
    again and again without progress. Lives in Ray's controller."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__(FailureConfig(max_failures=-1))
        self.mailbox = mailbox
        self.furthest = -1  # step at which an attempt began
        self.failures = 0  # since then

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        error = training_failed_error
        stopping, start = self._ask()
        if has_left(error):
            return FailureDecision.RAISE if stopping else FailureDecision.RETRY
        if user_error(error):
            return FailureDecision.RAISE
        # Whoever lost a node, or found no room although there was some, may find it the next time.
        if not (_is_preemption_failure(error) or is_about(error, WorkerGroupStartupTimeoutError)):
            self.failures = 1 if start > self.furthest else self.failures + 1
            self.furthest = max(start, self.furthest)
        again = self.failures < HOPELESS
        self.mailbox.tell.remote({"event": "failure", "cause": describe(error), "again": again})
        return FailureDecision.RETRY if again else FailureDecision.RAISE

    def _ask(self) -> tuple[bool, int]:
        """Whether the run is to stop, and the step at which its newest attempt began."""
        try:
            asked = [self.mailbox.is_stopping.remote(), self.mailbox.start.remote()]
            stopping, start = ray.get(asked, timeout=5)
        except ray.exceptions.RayError:
            return False, self.furthest
        return stopping, start


def _causes(error: TrainingFailedError) -> list[BaseException]:
    """What stopped each worker, and what was behind it."""
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


def is_about(error: TrainingFailedError, kind: type[BaseException]) -> bool:
    return any(isinstance(cause, kind) for cause in _causes(error))


def has_left(error: TrainingFailedError) -> bool:
    """Whether the workers left because they were told to."""
    return is_about(error, Left)


def user_error(error: TrainingFailedError) -> UserError | None:
    """What only a person can mend, if that is what stopped a worker."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return UserError(str(cause).strip())
    return None


def describe(error: TrainingFailedError) -> str:
    """A failure's cause in one line: that a worker died, and not that others then lost it."""
    if is_about(error, WorkerGroupStartupTimeoutError):
        return "the workers did not start in time"
    if is_about(error, WorkerGroupStartupFailedError):
        return "a worker died while they started"
    died, others = [], []
    for rank, failure in getattr(error, "worker_failures", {}).items():
        cause = getattr(failure, "health_check_failure", None) or getattr(failure, "cause", None) or failure
        if isinstance(cause, ray.exceptions.RayActorError):
            died.append(f"worker {rank}{', with its node,' if 'node has died' in str(cause) else ''} died")
        elif isinstance(cause, WorkerHealthCheckTimeoutError):
            died.append(f"worker {rank} does not answer")
        elif _is_about_others(cause):
            others.append(f"worker {rank} lost its connection to another")
        else:
            others.append(f"worker {rank}: {_last_line(cause)}")
    return ", ".join(died) or (others or [_last_line(error)])[0]


def is_of_machines(error: TrainingFailedError) -> bool:
    """Whether machines and networks failed, and not the program: then its traceback is of no interest."""
    kinds = (ray.exceptions.RayActorError, WorkerHealthCheckTimeoutError, WorkerGroupStartupTimeoutError)
    return any(is_about(error, kind) for kind in kinds)


def _is_about_others(error: BaseException) -> bool:
    """Whether a collective failed: those that are left learn of a death so, often before Ray does."""
    return "gloo" in str(error) or "NCCL" in str(error)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
