"""Elastic training on a cluster of real raylets: nodes join, drain and die, and the model equals an uninterrupted run's."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train import ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.elastic import preemption, scaling
from cluster.elastic.mailbox import Mailbox
from pipeline.dataset.dataset import Dataset
from pipeline.storage.store import Store, open_store
from tests.support.runs import running, wait_until
from tests.support.training.raylets import (
    SMALL,
    assert_each_place_once,
    assert_same_model,
    attempts,
    snapshots,
)
from trainer.config.recipe import load_config
from trainer.config.schema import PretrainConfig
from trainer.run.checkpoint import committed_steps
from trainer.run.metrics import read_metrics
from trainer.run.run import create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.train.pretrain import pretrain

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def reference(elastic_recipe: Path, scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An uninterrupted run in one process."""
    out = str(tmp_path_factory.mktemp("runs") / "whole")
    config, run = open_run(out, load_config(PretrainConfig, elastic_recipe, ("workers=1",)), scenes)
    create_run(config, run, scenes)
    assert pretrain(config, scenes, run, Worker(), Callbacks())
    return open_store(out)


@pytest.mark.timeout(600)
def test_nodes_come_and_go(
    cluster: Cluster, elastic_recipe: Path, scenes: Dataset, reference: Store, tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(2)]
    store = open_store(str(tmp_path / "run"))
    command = (
        "pretrain",
        "--config",
        elastic_recipe,
        "--data",
        scenes.store.url,
        "--out",
        store.root,
        "--ledger",
    )

    def wait_for(count: int, workers: int) -> dict[str, Any]:
        """Wait until attempt `count` trains, and return its event."""
        wait_until(lambda: len(attempts(store)) == count)
        newest = attempts(store)[-1]
        assert newest["world_size"] == workers, newest
        return newest

    with running(command) as process:
        wait_for(1, workers=2)

        # A node joins: no step is repeated.
        nodes.append(cluster.add_node(num_cpus=1, **SMALL))
        grown = wait_for(2, workers=3)
        assert grown["redone"] == 0
        assert grown["step"] > 0

        # A node gets a preemption notice: no step is repeated, and the node is no longer used.
        assert preemption.drain(nodes[0].node_id, "needed elsewhere", 60)
        shrunk = wait_for(3, workers=2)
        assert shrunk["redone"] == 0
        cluster.remove_node(nodes.pop(0), allow_graceful=False)

        # A node dies without notice, and its snapshots are lost.
        time.sleep(1)
        dead = nodes.pop(0)
        shutil.rmtree(snapshots(store) / dead.node_id, ignore_errors=True)
        dead.kill_raylet()
        shutil.rmtree(snapshots(store) / dead.node_id, ignore_errors=True)
        alone = wait_for(4, workers=1)
        assert alone["redone"] == 0

        # The job is stopped and submitted again: no step is repeated.
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=180)
        assert process.returncode == 130, printed
        assert f"stopped after step {committed_steps(store)[-1]}, with a checkpoint" in printed
        assert not snapshots(store).exists()
    with running(command) as process:
        again = wait_for(5, workers=1)
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed
    rows = read_metrics(store)
    assert again["step"] == len([row for row in rows if row["attempt"] < 5])
    assert_same_model(store, reference)
    assert_each_place_once(store, scenes, elastic_recipe, 300)
    assert not snapshots(store).exists()


def test_capacity_excludes_other_jobs_and_draining_and_dead_nodes(cluster: Cluster) -> None:
    nodes = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(3)]
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote("a-run")
    policy = scaling.AvailableCapacityPolicy(ScalingConfig(num_workers=(1, 3)), "a-run", mailbox, roster=None)
    policy.after_controller_start(None)
    wait_until(lambda: policy.measure_capacity() == (3, 3), 10)
    # Two nodes are occupied, one of them by the run itself.
    places = [NodeAffinitySchedulingStrategy(node.node_id, soft=False) for node in nodes[:2]]
    tenants = [ray.remote(num_cpus=1, scheduling_strategy=place)(Mailbox).remote("a-run") for place in places]
    ray.get([tenant.steps_done.remote() for tenant in tenants])
    wait_until(lambda: policy.measure_capacity() == (3, 1), 10)
    policy.in_use = {nodes[1].node_id: {"CPU": 1}}
    assert policy.measure_capacity() == (3, 2)
    # A draining node does not count, and a replacement is requested.
    assert preemption.drain(nodes[1].node_id, "needed elsewhere", 60)
    wait_until(lambda: policy.measure_capacity() == (2, 1), 10)
    assert policy._get_num_workers_for_resource_request() == 4
    # A node whose raylet is dead does not count, from the first moment on.
    nodes[2].kill_raylet()
    assert policy.measure_capacity() == (1, 0)
