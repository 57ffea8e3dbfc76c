"""How many workers a run has: the policy that Ray Train follows when nodes join or leave.

Depends on Ray's internals (`ray.train.v2._internal`), which is why Ray's version is pinned:
tests/cluster/elastic/test_ray_internals.py fails when an internal that is used here changes.
"""

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import ray
from ray.train import Result, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.preemption import _get_draining_nodes
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroupPollStatus, WorkerGroupState

from cluster.elastic.failures import RestartPolicy, WorkersStopped
from cluster.elastic.worker_group import ElasticWorkerGroup, Limits
from cluster.elastic.worker_process import ask
from pipeline.text import plural
from trainer.group.requests import Request

# Each of these starts a process of its own, which costs seconds of CPU time. The first serves Ray datasets, which are not
# used here. The second frees the resources of a controller that dies while its driver lives; our driver would end as well.
UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)
POLL_S = 0.5  # between two measurements of the cluster's capacity
MAILBOX_TIMEOUT_S = 1.0
CONNECT_TIMEOUT_S = 1.0  # a node that accepts no connection within it counts as dead
RELEASE_S = 3.0  # resources of stopped workers, or of a dead driver, may look occupied for so long
Resources = dict[str, dict[str, float]]  # by node id: amount of each resource
log = logging.getLogger("maestream")


class _NoBackend(_TorchBackend):
    """Makes no process group."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        pass

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        pass

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        pass


class OwnGroups(TorchConfig):
    """Tells Ray that the workers make their process groups themselves, see `trainer.group.group`."""

    @property
    def backend_cls(self) -> type[_NoBackend]:
        return _NoBackend


class ElasticTrainer(TorchTrainer):
    """Ray's TorchTrainer with the scaling and restart policies of maestream.

    Args:
        run_id: id of the run.
        mailbox: handle of the run's `cluster.elastic.mailbox.Mailbox` actor.
        roster: handle of its `trainer.group.roster.Roster` actor.
    """

    def __init__(self, *args: Any, run_id: str, mailbox: Any, roster: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_id, self.mailbox, self.roster = run_id, mailbox, roster

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, UNUSED_CALLBACKS)]

    def _initialize_and_run_controller(self, **kwargs: Any) -> Result:
        kwargs["scaling_policy"] = AvailableCapacityPolicy(
            self.scaling_config, self.run_id, self.mailbox, self.roster
        )
        kwargs["failure_policy"] = RestartPolicy(self.mailbox)
        return super()._initialize_and_run_controller(**kwargs)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Do nothing. Ray's handler aborts at once; `cluster.elastic.driver` has one that saves a checkpoint first."""


class AvailableCapacityPolicy(ElasticScalingPolicy):
    """Start as many workers as fit on the nodes that are alive. `ElasticWorkerGroup` adds more while they train.

    While they train, ask those on draining nodes to leave. Ask all to save their state and stop if too few would be left, or
    if the run should stop. Runs in Ray's controller process.
    """

    def __init__(self, scaling_config: ScalingConfig, run_id: str, mailbox: Any, roster: Any) -> None:
        super().__init__(scaling_config)
        self.run_id, self.mailbox, self.roster = run_id, mailbox, roster
        self.stopping = False  # the current workers were asked to save their state and stop
        self.asked: set[str] = set()  # draining nodes whose workers were asked to leave
        self.released_at = time.monotonic()  # when the previous workers, or the previous driver, stopped
        self.waiting = False  # for capacity
        # Resources of the current workers, or of the last ones: Ray ends those when it starts the next group.
        self.in_use: Resources = {}
        self.draining_capacity = 0  # workers that would fit on draining nodes
        self.measured_at, self.capacity = -POLL_S, (0, 0)

    def after_controller_start(self, train_run_context: Any) -> None:
        limits = Limits(
            self.roster,
            self.mailbox,
            int(self.scaling_config.min_workers),
            int(self.scaling_config.max_workers),
            has_room=lambda workers: self._recent_capacity()[1] > workers,
            usable_nodes=usable_nodes,
        )
        TrainController.worker_group_cls = type("WorkerGroup", (ElasticWorkerGroup,), {"limits": limits})
        # All drivers of a run use the same name. Otherwise Ray would keep a killed driver's reservation for 3 minutes.
        super().after_controller_start(SimpleNamespace(run_id=f"maestream-{self.run_id}"))

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if self.is_stopping():
            raise WorkersStopped
        self.stopping, self.asked = False, set()
        self._maybe_send_resource_request()
        reserved, free = self._recent_capacity()
        releasing = free < reserved and time.monotonic() - self.released_at < RELEASE_S
        if free >= self.scaling_config.min_workers and not releasing:
            self.waiting, self.in_use, self.released_at = False, {}, time.monotonic()
            return self._get_resize_decision(free)
        if not (releasing or self.waiting):
            self.waiting = True
            needed = plural(int(self.scaling_config.min_workers), "worker")
            self._add_event("waiting", f"the cluster has capacity for {free} of at least {needed}")
        time.sleep(POLL_S)  # Ray calls again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        self._maybe_send_resource_request()
        self.in_use = {}
        for worker in worker_group_state.workers:
            on_node = self.in_use.setdefault(worker.metadata.node_id, {})
            for name, amount in self.scaling_config._resources_per_worker_not_none.items():
                on_node[name] = on_node.get(name, 0) + amount
        if not self.stopping:
            self._ask_to_leave(worker_group_state.workers)
        # Workers stop by themselves. When all have, Ray calls the other method to learn how many to start.
        return NoopDecision()

    def _ask_to_leave(self, workers: list[Worker]) -> None:
        """Ask workers to leave whose nodes are draining; or all to save their state and stop."""
        draining = _draining_nodes() & self.in_use.keys()
        staying = [worker for worker in workers if worker.metadata.node_id not in draining]
        cause = f"{plural(len(draining), 'node')} will shut down soon"
        stop = self.is_stopping()
        if stop or (draining and len(staying) < self.scaling_config.min_workers):
            self.stopping = True
            self._add_event("leaving", "stop requested" if stop else cause, in_place=False)
            for worker in workers:
                worker.execute_async(ask, Request.SAVE)
        elif new := draining - self.asked:
            self.asked |= new
            self._add_event("leaving", cause, in_place=True)
            for worker in workers:
                if worker.metadata.node_id in new:
                    worker.execute_async(ask, Request.LEAVE)

    def is_stopping(self) -> bool:
        """Return whether the run should stop."""
        try:
            return bool(ray.get(self.mailbox.is_stopping.remote(), timeout=MAILBOX_TIMEOUT_S))
        except ray.exceptions.RayError:
            return False

    def _add_event(self, event: str, cause: str, **more: bool) -> None:
        self.mailbox.add_event.remote({"event": event, "cause": cause, **more})

    # ---- capacity of the cluster

    def _recent_capacity(self) -> tuple[int, int]:
        """Return `measure_capacity()` of at most POLL_S ago; (0, 0) if Ray's head does not respond."""
        now = time.monotonic()
        if now - self.measured_at > POLL_S:
            self.measured_at = now
            try:
                self.capacity = self.measure_capacity()
            except Exception as error:  # Ray's head is busy: the next measurement may succeed
                log.info("cannot measure the cluster's capacity: %s", error)
                self.capacity = 0, 0
        return self.capacity

    def measure_capacity(self) -> tuple[int, int]:
        """Return how many workers fit on the reserved nodes that are alive, and how many of these fit now.

        The second number leaves out resources that other jobs use. Ray's own view is not enough: it is up to 20 s old,
        ignores other jobs, and counts nodes that are dead or draining, where the start of a worker would time out.
        """
        reserved: Resources = ray.get(
            self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True),
            timeout=5,
        )
        draining = _draining_nodes()
        capacity = self._count_possible_workers({node: reserved[node] for node in draining & reserved.keys()})
        if capacity != self.draining_capacity:  # request replacements for the draining nodes
            self.draining_capacity = capacity
            self._send_resource_request()
        nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] in reserved.keys() - draining]
        with ThreadPoolExecutor(32) as pool:
            alive = [n["NodeID"] for n, up in zip(nodes, pool.map(_is_reachable, nodes), strict=True) if up]
        available: Resources = ray._private.state.available_resources_per_node()
        free: Resources = {}
        for node in alive:
            own, unused = self.in_use.get(node, {}), available.get(node, {})
            free[node] = {
                name: min(amount, unused.get(name, 0) + own.get(name, 0))
                for name, amount in reserved[node].items()
            }
        return (
            self._count_possible_workers({node: reserved[node] for node in alive}),
            self._count_possible_workers(free),
        )

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self.scaling_config.max_workers) + self.draining_capacity


def _draining_nodes() -> set[str]:
    """Return the ids of the nodes that will shut down soon, as Ray has been told."""
    return set(_get_draining_nodes() or {})


def usable_nodes() -> set[str]:
    """Return the ids of the nodes on which workers can be started: they are alive, and will not shut down soon."""
    draining = _draining_nodes()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in draining]
    return {n["NodeID"] for n in nodes if _is_reachable(n)}


def _is_reachable(node: dict[str, Any]) -> bool:
    """Return whether a node's raylet accepts connections. Ray notices a dead node seconds later."""
    try:
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        socket.create_connection(address, CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
