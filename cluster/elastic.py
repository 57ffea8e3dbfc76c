"""What Ray Train is told to do when workers come and go.

Leans on the insides of Ray (`ray.train.v2._internal`), which is why its version is pinned:
tests/cluster/test_elastic.py fails loudly when what is leaned on changes.
"""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.train import FailureConfig, Result, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.failure_handling.default import (
    RETRYABLE_CONTROLLER_ERRORS,
    _is_preemption_failure,
)
from ray.train.v2._internal.execution.preemption import _get_draining_nodes
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.exceptions import ControllerError

from pipeline.errors import UserError
from trainer.vote import Wish

HOPELESS = 3  # so many failures, with no attempt between them that began further on, stop a run
GROW_S = (
    10.0  # from a start to the first thought of growing: nodes come in groups, and Ray's view lags behind
)
LOOK_S = 1.0  # between two looks at the cluster
REACH_S = 1.0  # a node that takes no connection within it is not there


class Left(Exception):  # noqa: N818  # it is no error
    """All workers have left, with their work saved."""


class ElasticTrainer(TorchTrainer):
    """Ray's trainer with our policies.

    Args:
        mailbox: where the run's workers leave word, see `cluster.console`.
    """

    def __init__(self, *args: Any, mailbox: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mailbox = mailbox

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        parts["scaling_policy"] = AsManyAsThereIsRoomFor(self.scaling_config, self.mailbox)
        parts["failure_policy"] = StopWhenHopeless(self.mailbox)
        return super()._initialize_and_run_controller(**parts)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's would abort at once: who is interrupted asks the workers to commit and leave, see `cluster.train`."""


# ---- how many workers -----------------------------------------------------------------------------------------


class AsManyAsThereIsRoomFor(ElasticScalingPolicy):
    """Start workers on all nodes that are really there. While they train, tell them to leave, with their work saved,
    when there is room for more of them, when one of their nodes is about to go, and when the run is to stop. Lives in
    Ray's controller."""

    def __init__(self, scaling_config: ScalingConfig, mailbox: Any) -> None:
        super().__init__(scaling_config)
        self.mailbox = mailbox
        self.told = Wish.GO_ON  # what the workers that train now have been told
        self.waits = False  # for room
        self.looked = -LOOK_S
        self.seen: dict[str, dict[str, float]] | None = None  # what each node had for this run then

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if ray.get(self.mailbox.is_stopping.remote()):
            raise Left
        self.told = Wish.GO_ON
        decision = super().make_decision_for_non_running_worker_group()
        waits = isinstance(decision, NoopDecision)
        if waits and not self.waits:
            room = self._count_possible_workers(self._get_reserved_resources() or {})
            self._tell_mailbox(
                "waiting", f"there is room for {room} of at least {self.scaling_config.min_workers}"
            )
        self.waits = waits
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        self._maybe_send_resource_request()
        wish, cause = self._wish(worker_group_state)
        if wish > self.told:
            self.told = wish
            self._tell_mailbox("leaving", cause)
            for worker in worker_group_state.workers:
                worker.execute_async(tell_worker, wish)
        return NoopDecision()  # they leave by themselves, and then this is asked how many to start

    def _wish(self, state: WorkerGroupState) -> tuple[Wish, str]:
        if ray.get(self.mailbox.is_stopping.remote()):
            return Wish.SAVE, "asked to stop"
        if going := set(_get_draining_nodes() or {}) & {worker.metadata.node_id for worker in state.workers}:
            return Wish.SAVE, f"{len(going)} of its nodes will be gone soon"
        if (
            state.num_workers < self.scaling_config.max_workers
            and time.monotonic() - state.start_time > GROW_S
        ):
            room = self._count_possible_workers(self._get_reserved_resources() or {})
            if room > state.num_workers:
                return Wish.MOVE, f"there is room for {room} workers"
        return Wish.GO_ON, ""

    def _tell_mailbox(self, event: str, cause: str) -> None:
        self.mailbox.tell.remote({"event": event, "cause": cause})

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """What each node has for this run. Ray's own view is up to 20 s old, and a node that is dead, or going, makes
        it wait for workers there until its patience ends."""
        now = time.monotonic()
        if now - self.looked < LOOK_S:
            return self.seen
        self.looked, self.seen = now, None
        try:
            reserved = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(
                    self._requester_id, recompute=True
                ),
                timeout=5,
            )
        except ray.exceptions.RayError:  # the next look may find it
            return None
        going = _get_draining_nodes() or {}
        nodes = [
            n for n in ray.nodes() if n["Alive"] and n["NodeID"] in reserved and n["NodeID"] not in going
        ]
        with ThreadPoolExecutor(32) as pool:
            there = [n["NodeID"] for n, up in zip(nodes, pool.map(_is_up, nodes), strict=True) if up]
        self.seen = {node: reserved[node] for node in there}
        return self.seen


def _is_up(node: dict[str, Any]) -> bool:
    """Whether a node's raylet takes connections: Ray notices a death after seconds, its socket knows at once."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), REACH_S).close()
    except OSError:
        return False
    return True


_wish = Wish.GO_ON  # in a worker's process: what it has been told


def tell_worker(wish: Wish) -> None:
    global _wish
    _wish = max(_wish, wish)


def wish_of_this_worker() -> Wish:
    return _wish


# ---- after a failure ------------------------------------------------------------------------------------------


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
        if has_left(error):
            return (
                FailureDecision.RAISE if ray.get(self.mailbox.is_stopping.remote()) else FailureDecision.RETRY
            )
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
    for failure in [
        *getattr(error, "worker_failures", {}).values(),
        getattr(error, "controller_failure", None),
    ]:
        cause: BaseException | None = failure
        while cause is not None:
            found.append(cause)
            cause = getattr(cause, "cause", None) or cause.__cause__
    return found


def has_left(error: TrainingFailedError) -> bool:
    """Whether the workers left because they were told to."""
    return any(isinstance(cause, Left) for cause in _causes(error))


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
        elif isinstance(cause, WorkerHealthCheckTimeoutError):
            died.append(f"worker {rank} does not answer")
        else:
            others.append(f"worker {rank}: {_last_line(cause)}")
    return ", ".join(died) or (others or [_last_line(error)])[0]


def _last_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    # Those that are left learn of a death by their connection to the dead, often before Ray does.
    return "lost its connection to another" if "gloo" in line or "NCCL" in line else line
