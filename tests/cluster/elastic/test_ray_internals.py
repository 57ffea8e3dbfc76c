"""Ray's internals that cluster/elastic uses are those of the pinned version."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from cluster.elastic import failures, scaling
from cluster.elastic.driver import RAY_SETTINGS


def test_ray_internals_are_unchanged() -> None:
    """If this fails, Ray has changed: adapt cluster/elastic/scaling.py before the pin is raised."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import worker, worker_group
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
    # the failure policy gets the error, and may retry after any
    assert arguments(failures.FailurePolicy.make_decision) == ["training_failed_error"]
    assert {decision.name for decision in failures.FailureDecision} == {"RETRY", "RAISE", "NOOP"}
    # the environment variables that are set exist
    names = {value for name, value in vars(constants).items() if name.endswith("_ENV_VAR")}
    assert set(RAY_SETTINGS) <= names
