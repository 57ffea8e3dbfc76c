"""Ray's internals that cluster/elastic uses are those of the pinned version."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from cluster.elastic import failures, scaling
from cluster.elastic import worker_group as ours
from cluster.elastic.driver import RAY_SETTINGS


def test_ray_internals_are_unchanged() -> None:
    """If this fails, Ray has changed: adapt cluster/elastic before the pin is raised (docs/architecture.md has the list)."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
    from ray.train.torch.config import _TorchBackend
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.execution.context import DistributedContext
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import execution_group, poll, worker, worker_group
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    def arguments(function: Callable[..., Any]) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name != "self"]

    # the trainer creates the controller with these policies in one method, and handles SIGINT in another
    assert {"scaling_policy", "failure_policy"} <= set(arguments(TrainController.__init__))
    assert "controller_init_kwargs" in arguments(DataParallelTrainer._initialize_and_run_controller)
    assert "_register_sigint_handler" in inspect.getsource(DataParallelTrainer._initialize_and_run_controller)
    assert "self.worker_group_cls.create(" in inspect.getsource(TrainController._start_worker_group)
    # nothing else needs the two callbacks that are removed
    made = inspect.getsource(DataParallelTrainer._create_default_callbacks)
    assert all(f"{callback.__name__}(" in made for callback in scaling.UNUSED_CALLBACKS)
    assert (
        inspect.signature(worker.RayTrainWorker.init_train_context)
        .parameters["dataset_shard_provider"]
        .default
        is None
    )
    # the scaling policy: the methods that Ray calls, and those of Ray that it calls
    policy = scaling.ElasticScalingPolicy
    assert arguments(policy.make_decision_for_non_running_worker_group) == []
    asked = ["worker_group_state", "worker_group_status"]
    assert arguments(policy.make_decision_for_running_worker_group) == asked
    assert arguments(policy._count_possible_workers) == ["reserved_resources"]
    assert arguments(policy._get_num_workers_for_resource_request) == []
    assert arguments(policy._send_resource_request) == arguments(policy._maybe_send_resource_request) == []
    assert inspect.getsource(policy.after_controller_start).count("train_run_context.") == 1
    reserved = coordinator._AutoscalingCoordinatorActor.get_reserved_resources
    assert {"requester_id", "recompute"} <= set(arguments(reserved))
    assert {"start_time", "workers"} <= {field.name for field in fields(worker_group.WorkerGroupState)}
    assert arguments(worker.Worker.execute_async)[0] == "fn"
    assert "node_id" in {field.name for field in fields(worker.ActorMetadata)}
    # how a worker group starts, and how it cleans up after a failed start
    start = inspect.getsource(worker_group.WorkerGroup._start)
    assert "if not self.has_started():" in start  # otherwise it leaves its workers behind
    shutdown = inspect.getsource(worker_group.WorkerGroup.shutdown)
    assert "self._worker_group_state.shutdown()" in shutdown
    assert "self._clear_state()" in shutdown
    # the methods used when a worker group shuts down
    assert (
        arguments(worker_group.WorkerGroup.shutdown) == arguments(worker_group.WorkerGroup.get_workers) == []
    )
    # how a group is repaired and grows: what Ray's class does in the methods that are replaced or called
    group = worker_group.WorkerGroup
    assert arguments(group.poll_status) == arguments(group._poll_workers_and_collect_errors) == ["timeout"]
    polls = inspect.getsource(group._get_poll_tasks)
    assert (
        "self._world_rank_to_ongoing_poll.get(i)" in polls
    )  # by the position of the worker in get_workers()
    assert "self._worker_group_state.workers" in inspect.getsource(group.get_workers)
    assert arguments(group._init_train_context) == ["workers", "sync_actor"]
    created = inspect.getsource(group._create_workers)  # `_start_worker` repeats its steps for one worker
    assert "self._train_run_context.run_config.worker_runtime_env" in created
    assert "actor.get_metadata.remote()" in created
    assert "**bundle_to_remote_args(resources_per_worker)" in created
    assert list(inspect.signature(group._get_worker_runtime_env).parameters) == ["custom_runtime_env"]
    assert arguments(execution_group.ReplicaGroup) == ["workers", "resources_per_worker", "callbacks"]
    assert arguments(execution_group.ReplicaGroup.start_training) == ["worker_group_context"]
    assert {"actor", "metadata", "distributed_context", "placement_group_bundle_index"} <= {
        field.name for field in fields(worker.Worker)
    }
    assert [field.name for field in fields(DistributedContext)] == [
        *("world_rank", "world_size", "local_rank", "local_world_size", "node_rank")
    ]
    assert {"running", "error"} <= {field.name for field in fields(poll.WorkerStatus)}
    assert next(iter(fields(poll.WorkerGroupPollStatus))).name == "worker_statuses"
    # the controller asks for the status in its loop, and ends the run when all workers have ended without an error
    loop = inspect.getsource(TrainController._run_control_loop_iteration) + inspect.getsource(
        TrainController._step
    )
    assert "self._poll_workers()" in loop
    assert "worker_group_status.errors" in loop
    # the workers make their process groups themselves: nothing else is done by these methods
    overridden = {name for name in vars(scaling.OwnGroups().backend_cls) if name.startswith("on_")}
    assert overridden == {name for name in vars(_TorchBackend) if name.startswith("on_")}
    assert issubclass(ours.ElasticWorkerGroup, group)
    # the failure policy gets the error, and may retry after any
    assert arguments(failures.FailurePolicy.make_decision) == ["training_failed_error"]
    assert {decision.name for decision in failures.FailureDecision} == {"RETRY", "RAISE", "NOOP"}
    # the environment variables that are set exist
    names = {value for name, value in vars(constants).items() if name.endswith("_ENV_VAR")}
    assert set(RAY_SETTINGS) <= names
