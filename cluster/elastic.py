"""What Ray Train is told to do when workers come and go.

Leans on the insides of Ray (`ray.train.v2._internal`), which is why its version is pinned:
tests/cluster/test_elastic.py fails loudly when what is leaned on changes.
"""

from typing import Any

import ray
from ray.train import FailureConfig, Result, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.failure_handling.default import (
    RETRYABLE_CONTROLLER_ERRORS,
    _is_preemption_failure,
)
from ray.train.v2.api.exceptions import ControllerError

from pipeline.errors import UserError

HOPELESS = 3  # so many failures, with no attempt between them that began further on, stop a run


class ElasticTrainer(TorchTrainer):
    """Ray's trainer with our failure policy.

    Args:
        mailbox: where the run's workers leave word, see `cluster.console`.
    """

    def __init__(self, *args: Any, mailbox: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mailbox = mailbox

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        parts["failure_policy"] = StopWhenHopeless(self.mailbox)
        return super()._initialize_and_run_controller(**parts)


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
        if user_error(error) or not _may_pass(error):
            return FailureDecision.RAISE
        start, cause = ray.get(self.mailbox.start.remote()), describe(error)
        if not _is_preemption_failure(error):
            self.failures = 1 if start > self.furthest else self.failures + 1
            self.furthest = max(start, self.furthest)
        again = self.failures < HOPELESS
        self.mailbox.tell.remote({"event": "failure", "cause": cause, "again": again})
        return FailureDecision.RETRY if again else FailureDecision.RAISE


def _may_pass(error: TrainingFailedError) -> bool:
    """Whether it may be gone the next time: of the controller's own errors few are."""
    return not isinstance(error, ControllerError) or isinstance(
        error.controller_failure, RETRYABLE_CONTROLLER_ERRORS
    )


def _causes(error: TrainingFailedError) -> list[BaseException]:
    """What stopped each worker, and what was behind it."""
    found: list[BaseException] = []
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            found.append(cause)
            cause = getattr(cause, "cause", None) or cause.__cause__
    return found


def user_error(error: TrainingFailedError) -> UserError | None:
    """What only a person can mend, if that is what stopped a worker."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return UserError(str(cause).strip())
    return None


def describe(error: TrainingFailedError) -> str:
    """A failure's cause in one line: that a worker died, and not that others then lost it."""
    died, others = [], []
    for rank, failure in getattr(error, "worker_failures", {}).items():
        cause = getattr(failure, "health_check_failure", None) or getattr(failure, "cause", None) or failure
        if isinstance(cause, ray.exceptions.RayActorError):
            died.append(f"worker {rank} died" + (" with its node" if "node has died" in str(cause) else ""))
        else:
            others.append(f"worker {rank}: {_last_line(cause)}")
    return ", ".join(died) or (others or [_last_line(error)])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
