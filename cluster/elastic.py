"""As many workers as there is room for: what Ray Train is told to do when nodes come and go.

Leans on the insides of Ray (`ray.train.v2._internal`), which is why its version is pinned:
tests/cluster/test_elastic.py fails loudly when what is leaned on changes.
"""

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import ray
from ray.train import Result, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.preemption import _get_draining_nodes
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import (
    WorkerGroup,
    WorkerGroupPollStatus,
    WorkerGroupState,
)

from cluster.failures import Left, StopWhenHopeless
from trainer.vote import Wish

# Each starts a process of its own, for some seconds of CPU: Ray's datasets, which we have none of, and who frees what a
# controller had reserved that died while its driver goes on, which ours does not.
UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)
LOOK_S = 0.5  # between two looks at the cluster
REACH_S = 1.0  # a node that takes no connection within it is not there
ANSWER_S = 1.0  # a worker that is to end and does not answer within it is stuck
SETTLE_S = 3.0  # so long after a group, or a driver, has ended what it held may still seem taken
GROW_S = 10.0  # from a start to the first thought of growing: Ray's view of nodes lags behind
STEADY_S = 3.0  # so long room for more has to be there: nodes come in groups
Room = dict[str, dict[str, float]]  # node → what it has for this run
log = logging.getLogger("maestream")


class ElasticTrainer(TorchTrainer):
    """Ray's trainer with our policies.

    Args:
        run_id: of the run.
        mailbox: where the run's workers leave word, see `cluster.console`.
    """

    def __init__(self, *args: Any, run_id: str, mailbox: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_id, self.mailbox = run_id, mailbox

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, UNUSED)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        parts["scaling_policy"] = AsManyAsThereIsRoomFor(self.scaling_config, self.run_id, self.mailbox)
        parts["failure_policy"] = StopWhenHopeless(self.mailbox)
        return super()._initialize_and_run_controller(**parts)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's would abort at once: who is interrupted asks the workers to commit and leave, see `cluster.train`."""


class TidyWorkerGroup(WorkerGroup):
    """Ray's own leaves its workers and what they hold behind if one dies while they join each other, and waits twice
    for those that do not answer, 8 s in all, before it kills them."""

    def _start(self) -> None:
        try:
            super()._start()
        except Exception:
            if self.has_started():
                self._worker_group_state.shutdown()
                self._clear_state()
            raise

    def shutdown(self) -> None:
        if self.has_started():
            answers = {worker.execute_async(wish_of_this_worker): worker for worker in self.get_workers()}
            _, silent = ray.wait(list(answers), num_returns=len(answers), timeout=ANSWER_S)
            for answer in silent:
                ray.kill(answers[answer].actor)
        super().shutdown()


class AsManyAsThereIsRoomFor(ElasticScalingPolicy):
    """Start workers on all nodes that are really there. While they train, tell them to leave, with their work saved,
    when there is room for more of them, when one of their nodes is about to go, and when the run is to stop. Lives in
    Ray's controller."""

    def __init__(self, scaling_config: ScalingConfig, run_id: str, mailbox: Any) -> None:
        super().__init__(scaling_config)
        self.run_id, self.mailbox = run_id, mailbox
        self.told = Wish.GO_ON  # what the workers that train now have been told
        self.released_at = (
            time.monotonic()
        )  # when a group before, or the run's driver before, let go what it held
        self.waits = False  # for room
        self.room, self.room_since = 0, 0.0  # for so many workers, and since when
        self.held: Room = {}  # by the workers that train now, or did: Ray ends them when it starts the next
        self.on_going_nodes = 0  # workers that would fit on nodes that are about to go
        self.looked, self.seen = -LOOK_S, (0, 0)

    def after_controller_start(self, train_run_context: Any) -> None:
        TrainController.worker_group_cls = TidyWorkerGroup
        # The same name for all of a run's drivers: what one reserved that was killed would be kept for it for 3 minutes.
        super().after_controller_start(SimpleNamespace(run_id=f"maestream-{self.run_id}"))

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if self.is_stopping():
            raise Left
        self.told = Wish.GO_ON
        self._maybe_send_resource_request()
        there, free = self._look()
        settling = free < there and time.monotonic() - self.released_at < SETTLE_S
        if free >= self.scaling_config.min_workers and not settling:
            self.waits, self.held, self.released_at = False, {}, time.monotonic()
            return self._get_resize_decision(free)
        if not (settling or self.waits):
            self.waits = True
            self._tell_mailbox(
                "waiting", f"there is room for {free} of at least {self.scaling_config.min_workers}"
            )
        time.sleep(LOOK_S)  # Ray asks again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        self._maybe_send_resource_request()
        self.held = {}
        for worker in worker_group_state.workers:
            on_node = self.held.setdefault(worker.metadata.node_id, {})
            for name, amount in self.scaling_config._resources_per_worker_not_none.items():
                on_node[name] = on_node.get(name, 0) + amount
        wish, cause = self._wish(worker_group_state)
        if wish > self.told:
            self.told = wish
            self._tell_mailbox("leaving", cause)
            for worker in worker_group_state.workers:
                worker.execute_async(tell_worker, wish)
        return NoopDecision()  # they leave by themselves, and then this is asked how many to start

    def _wish(self, state: WorkerGroupState) -> tuple[Wish, str]:
        if self.is_stopping():
            return Wish.SAVE, "asked to stop"
        if going := _going() & self.held.keys():
            return Wish.SAVE, f"{len(going)} of its nodes will be gone soon"
        now = time.monotonic()
        if state.num_workers < self.scaling_config.max_workers and now - state.start_time > GROW_S:
            _, room = self._look()
            if room != self.room:
                self.room, self.room_since = room, now
            elif room > state.num_workers and now - self.room_since > STEADY_S:
                return Wish.MOVE, f"there is room for {room} workers"
        return Wish.GO_ON, ""

    def is_stopping(self) -> bool:
        """Whether the run is to stop."""
        try:
            return bool(ray.get(self.mailbox.is_stopping.remote(), timeout=REACH_S))
        except ray.exceptions.RayError:
            return False

    def _tell_mailbox(self, event: str, cause: str) -> None:
        self.mailbox.tell.remote({"event": event, "cause": cause})

    # ---- what there is

    def _look(self) -> tuple[int, int]:
        """For how many workers the nodes that are really there have been reserved, and how many of them find nobody
        else's work there. Ray's own view is up to 20 s old, knows of no other work, and a node that is dead, or going,
        makes it wait for workers there until its patience ends."""
        now = time.monotonic()
        if now - self.looked > LOOK_S:
            self.looked = now
            try:
                self.seen = self._look_now()
            except Exception as error:  # Ray's head has no time: the next look may find it
                log.info("no view of the cluster: %s", error)
                self.seen = 0, 0
        return self.seen

    def _look_now(self) -> tuple[int, int]:
        reserved: Room = ray.get(
            self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True),
            timeout=5,
        )
        going = _going()
        on_going = self._count_possible_workers({node: reserved[node] for node in going & reserved.keys()})
        if on_going != self.on_going_nodes:  # others are to be reserved in their place
            self.on_going_nodes = on_going
            self._send_resource_request()
        nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] in reserved.keys() - going]
        with ThreadPoolExecutor(32) as pool:
            there = [n["NodeID"] for n, up in zip(nodes, pool.map(_is_up, nodes), strict=True) if up]
        available: Room = ray._private.state.available_resources_per_node()
        free: Room = {}
        for node in there:
            mine, open_ = self.held.get(node, {}), available.get(node, {})
            free[node] = {
                name: min(amount, open_.get(name, 0) + mine.get(name, 0))
                for name, amount in reserved[node].items()
            }
        return (
            self._count_possible_workers({node: reserved[node] for node in there}),
            self._count_possible_workers(free),
        )

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self.scaling_config.max_workers) + self.on_going_nodes


def _going() -> set[str]:
    """Nodes that Ray has been told will go."""
    return set(_get_draining_nodes() or {})


def _is_up(node: dict[str, Any]) -> bool:
    """Whether a node's raylet takes connections: Ray notices a death after seconds, its socket knows at once."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), REACH_S).close()
    except OSError:
        return False
    return True


# ---- in a worker's process ------------------------------------------------------------------------------------

_wish = Wish.GO_ON  # what it has been told


def tell_worker(wish: Wish) -> None:
    global _wish
    _wish = max(_wish, wish)


def wish_of_this_worker() -> Wish:
    return _wish
