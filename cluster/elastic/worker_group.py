"""Ray's group of worker processes, which loses and gets workers while the others train.

Ray Train 2.60 restarts all workers after any change. Here the controller's regular poll repairs the group in place:

- A worker that is dead, stuck or failed is removed. The controller informs the roster (`trainer.group.roster`) and the other workers, and
  they form the next generation.
- A worker that has left because its machine goes away is removed.
- New workers are started beside those that train, as long as there is room (`_recruit`). Once one is ready, it waits at the
  roster, and the others are asked to form the next generation with it.

If all workers are lost, if they stop, or if one has an error for the user, Ray's controller decides as usual: it asks
`cluster.elastic.failures.RestartPolicy`.

Depends on Ray's internals, as `cluster.elastic.scaling` does.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.train.v2._internal.execution.context import DistributedContext
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.util import bundle_to_remote_args
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.elastic.failures import describe, find_user_error, record_failure, workers_stopped
from cluster.elastic.worker_process import ask, give_up, report_lost, responds
from trainer.group.requests import Request
from trainer.group.roster import Status

SHUTDOWN_TIMEOUT_S = 1.0  # a worker that does not respond within it is killed
ROSTER_TIMEOUT_S = 2.0  # the roster is on the controller's node
PLACE_TIMEOUT_S = 5.0  # for Ray to reserve a place that seems to be free
START_S = 60.0  # for a new worker's process to start, before it is killed
RETRY_S = 5.0  # before the next try, if a worker could not be started
log = logging.getLogger("maestream")


@dataclass(frozen=True)
class Place:
    """Resources for one worker that the run has reserved."""

    group: PlacementGroup
    index: int  # of the bundle in the placement group
    node: str | None  # id of its node; None: not known


@dataclass(frozen=True)
class Limits:
    """What a run wants of its workers."""

    roster: Any  # handle of the actor
    mailbox: Any  # handle of the actor
    least: int  # workers
    most: int
    # Whether the cluster has room for more workers than these; and the ids of nodes that new workers may use.
    has_room: Callable[[int], bool]
    usable_nodes: Callable[[], set[str]]


class ElasticWorkerGroup(WorkerGroup):
    """A worker group that is repaired and grows in place."""

    limits: Limits  # set before the class is used
    _worker_group_state: Any  # Ray's
    _world_rank_to_ongoing_poll: dict[int, Any]

    def _start(self) -> None:
        self.spare: list[Place] = []  # of workers that are gone
        self.own_groups: list[PlacementGroup] = []  # reserved for workers that were started later
        self.places: dict[str, Place] = {}  # by name of such a worker
        self.recruits: list[Worker] = []  # started, but not yet among the workers
        self.starting = 0  # workers that are being started
        self.retry_at = 0.0
        self.last_asked: object = (
            None  # the last state of the roster in which the workers were asked to let others join
        )
        self.lock = threading.Lock()  # of all of these
        self.closing = False
        try:
            super()._start()
        except Exception:
            # Ray leaves workers and their resources behind if a worker dies while the group starts.
            if self.has_started():
                self._worker_group_state.shutdown()
                self._clear_state()
            raise

    def _init_train_context(self, workers: list[Worker], sync_actor: Any) -> None:
        if not self.has_started():  # the first workers
            ray.get(
                self.limits.roster.start.remote([name_of(worker) for worker in workers], self.limits.least)
            )
        super()._init_train_context(workers, sync_actor)

    def shutdown(self) -> None:
        """End all workers. Ray's class waits for unresponsive ones twice, 8 s in total, before it kills them."""
        self.closing = True
        if self.has_started():
            calls = {worker.execute_async(responds): worker for worker in self.get_workers()}
            _, unanswered = ray.wait(list(calls), num_returns=len(calls), timeout=SHUTDOWN_TIMEOUT_S)
            for call in unanswered:
                ray.kill(calls[call].actor)
        super().shutdown()
        with self.lock:
            for worker in self.recruits:
                ray.kill(worker.actor)
            for group in self.own_groups:
                remove_placement_group(group)

    def poll_status(self, timeout: float | None = None) -> WorkerGroupPollStatus:
        """Return the status of each worker, after the group was repaired in place as far as possible.

        Ray's callbacks for a poll are not called: they serve `ray.train.report`, which maestream does not use.
        """
        self._assert_active()
        statuses = self._poll_workers_and_collect_errors(timeout)
        if self.limits.most > 1 and (status := self._roster_status()):
            statuses = self._repair(statuses, status)
            self._grow(status)
        self._latest_poll_status = WorkerGroupPollStatus(dict(enumerate(statuses)))
        return self._latest_poll_status

    def _roster_status(self) -> Status | None:
        try:
            status: Status = ray.get(self.limits.roster.status.remote(), timeout=ROSTER_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None
        return status

    # ---- workers that are lost or have left

    def _repair(self, statuses: list[WorkerStatus], roster: Status) -> list[WorkerStatus]:
        """Remove workers that are lost or have left. Returns the statuses of the others, or all of them if it cannot."""
        workers = self.get_workers()
        names = [name_of(worker) for worker in workers]
        failed = [i for i, status in enumerate(statuses) if status.error]
        left = [
            i for i, s in enumerate(statuses) if not s.running and not s.error and names[i] in roster.removed
        ]
        members = [i for i in failed if names[i] in roster.members or not roster.members]
        if members:
            error = WorkerGroupPollStatus({i: statuses[i] for i in members}).get_worker_group_error()
            remaining = [i for i in range(len(workers)) if i not in failed and names[i] in roster.members]
            if workers_stopped(error) or find_user_error(error) or not remaining:
                return statuses
            if not record_failure(self.limits.mailbox, error, in_place=True):
                return statuses
        for i in set(failed) - set(members):
            self._report_not_joined(statuses[i])
        if gone := {*failed, *left}:
            self._remove([workers[i] for i in gone], [names[i] for i in failed])
        return [status for i, status in enumerate(statuses) if i not in gone]

    def _remove(self, gone: Sequence[Worker], lost: list[str]) -> None:
        """Remove workers from the group; those that are lost are killed. Their places can be used again."""
        workers = self.get_workers()
        kept = [worker for worker in workers if worker not in gone]
        for worker in gone:
            ray.kill(worker.actor)  # one that is stuck as well: its connections have to close
        for name in lost:
            self.limits.roster.remove.remote(name)
        for worker in kept:
            worker.execute_async(report_lost, lost)
        # Polls that have not been answered yet are known by the position of their worker.
        ongoing = {name_of(workers[i]): poll for i, poll in self._world_rank_to_ongoing_poll.items()}
        self._world_rank_to_ongoing_poll = {
            i: ongoing[name_of(worker)] for i, worker in enumerate(kept) if name_of(worker) in ongoing
        }
        self._set_workers(kept)
        with self.lock:
            self.spare += [self._place_of(worker) for worker in gone]

    def _place_of(self, worker: Worker) -> Place:
        first = self._worker_group_state.placement_group_handle.placement_group
        index = worker.placement_group_bundle_index
        return self.places.pop(name_of(worker), Place(first, index, worker.metadata.node_id))

    def _set_workers(self, workers: list[Worker]) -> None:
        self._worker_group_state = replace(self._worker_group_state, workers=workers)

    # ---- new workers

    def _grow(self, roster: Status) -> None:
        """Take in workers that were started, start more if there is room, and let those that are ready join."""
        with self.lock:
            started, self.recruits = self.recruits, []
            self._set_workers([*self.get_workers(), *started])
            missing = self.limits.most - len(self.get_workers()) - self.starting
            if missing > 0 and time.monotonic() > self.retry_at:
                self.starting += 1
                threading.Thread(target=self._recruit, name="recruit", daemon=True).start()
        for worker in self.get_workers():
            if name_of(worker) in roster.overdue:
                worker.execute_async(give_up, roster.number)
        if roster.joining and self.last_asked != (roster.number, roster.joining):
            self.last_asked = roster.number, roster.joining
            for worker in self.get_workers():
                if name_of(worker) in roster.members:
                    worker.execute_async(ask, Request.CHANGE)

    def _recruit(self) -> None:
        """Start a worker beside the others. Runs in a thread: it takes seconds, and the controller has to poll meanwhile."""
        place = worker = None
        try:
            place = self._find_place()
            if place is not None:
                worker = self._start_worker(place)
        except Exception as error:  # its node was lost meanwhile, for example: the next try may succeed
            log.info("a worker could not be started: %s", error)
        with self.lock:
            self.starting -= 1
            if self.closing:  # meanwhile all workers were ended
                if worker is not None:
                    ray.kill(worker.actor)
                for group in self.own_groups:
                    remove_placement_group(group)
            elif worker is None:
                self.retry_at = time.monotonic() + RETRY_S
                if place is not None:
                    self.spare.append(place)
            else:
                self.recruits.append(worker)

    def _find_place(self) -> Place | None:
        """Return a place for one more worker: that of one that is gone, or a new one. None if the cluster has no room."""
        usable = self.limits.usable_nodes()
        with self.lock:
            if here := next((place for place in self.spare if place.node in usable), None):
                self.spare.remove(here)
                return here
        if not self.limits.has_room(len(self.get_workers())):
            return None
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        with self.lock:
            # Ray moves the places of a dead node to another one as soon as there is room.
            if moved := next((place for place in self.spare if place.node not in alive), None):
                self.spare.remove(moved)
                return replace(moved, node=None)
        group = placement_group([self._worker_group_context.resources_per_worker])
        with self.lock:
            self.own_groups.append(group)
        if group.wait(PLACE_TIMEOUT_S):
            return Place(group, 0, None)
        with self.lock:
            self.own_groups.remove(group)
        remove_placement_group(group)
        return None

    def _start_worker(self, place: Place) -> Worker:
        """Start a worker, and its training function. One that has not started within START_S is killed; then this raises."""
        resources, workers = self._worker_group_context.resources_per_worker, self.get_workers()
        environment = self._get_worker_runtime_env(self._train_run_context.run_config.worker_runtime_env)
        actor_class = ray.remote(runtime_env=environment, **bundle_to_remote_args(resources))(
            self._worker_cls
        )
        strategy = PlacementGroupSchedulingStrategy(place.group, place.index)
        actor = actor_class.options(scheduling_strategy=strategy).remote()
        # Ray's calls below wait for the worker without a limit: it may hang, or its place may be taken away.
        limit = threading.Timer(START_S, ray.kill, [actor])
        limit.daemon = True
        limit.start()
        try:
            metadata = ray.get(actor.get_metadata.remote())
            local = sum(other.metadata.node_ip == metadata.node_ip for other in workers)
            context = DistributedContext(len(workers), len(workers) + 1, local, local + 1, node_rank=0)
            worker = Worker(actor, metadata, resources, context, placement_group_bundle_index=place.index)
            super()._init_train_context([worker], self._worker_group_state.sync_actor)
            ReplicaGroup([worker], resources, self._replica_group_callbacks).start_training(
                self._worker_group_context
            )
        except Exception:
            ray.kill(actor)
            raise
        finally:
            limit.cancel()
        with self.lock:
            self.places[name_of(worker)] = replace(place, node=metadata.node_id)
        return worker

    def _report_not_joined(self, status: WorkerStatus) -> None:
        """Report that a new worker failed before it trained. The others go on without it."""
        with self.lock:
            self.retry_at = time.monotonic() + RETRY_S
        error = WorkerGroupPollStatus({0: status}).get_worker_group_error()
        cause = find_user_error(error) or describe(error)
        self.limits.mailbox.add_event.remote({"event": "not_joined", "cause": str(cause)})


def name_of(worker: Worker) -> str:
    """Return the name of a worker at the roster: the id of its actor, in hexadecimal."""
    return str(worker.actor._actor_id.hex())
