"""Many faults in a row, on a cluster of real raylets; the model equals that of a run without any."""

import os
import random
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from ray.cluster_utils import Cluster

from pipeline.dataset.dataset import Dataset
from pipeline.storage.store import Store, open_store
from tests.support.fault_proxy import SLOW_DOWN, fault_proxy
from tests.support.runs import wait_until
from tests.support.training.raylets import (
    Faults,
    assert_each_place_once,
    assert_same_model,
    attempts,
    size,
    snapshots,
)
from tests.support.training.small_runs import request_after
from trainer.config.recipe import load_config
from trainer.config.schema import PretrainConfig
from trainer.group.requests import Request
from trainer.run.checkpoint import committed_steps
from trainer.run.events import read_events
from trainer.run.metrics import read_metrics
from trainer.run.run import create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.train.pretrain import pretrain

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]

FAULTS = ("kill_worker", "stop_worker", "kill_node", "drain_node", "add_node", "kill_driver", "stop_job")
IN_PLACE = (
    *("kill_worker", "kill_worker", "stop_worker", "kill_two_workers"),
    *("kill_a_worker_while_the_others_regroup", "kill_a_worker_that_joins"),
    *("kill_node", "cut_power_of_node", "drain_node", "drain_node_while_one_joins", "add_node"),
    *("kill_all_workers", "kill_driver", "stop_job"),
)


def test_a_hundred_faults(cluster: Cluster, elastic_recipe: Path, scenes: Dataset, tmp_path: Path) -> None:
    """Faults of all kinds, also while the workers regroup, join and leave. The run is stopped after the last one."""
    store, rng = open_store(str(tmp_path / "run")), random.Random(int(os.environ.get("SEED", "1")))
    endless = ("epochs=100000", "checkpoint.every_steps=400")
    command = ("pretrain", "--config", elastic_recipe, "--data", scenes.store.url, "--out", store.root)
    faults = Faults(cluster, (*command, "--ledger", *endless), store, rng)
    with faults.stack:
        wait_until(lambda: attempts(store))
        order = [*IN_PLACE, *rng.choices(IN_PLACE, k=100 - len(IN_PLACE))]
        for number, fault in enumerate(rng.sample(order, len(order))):
            time.sleep(rng.uniform(0.2, 3))
            begin, before = time.time(), len(read_metrics(store))
            faults.do(fault, steps=10)
            new = [event for event in attempts(store) if event["time"] > begin]
            print(number, fault, before, faults.memory[-1], new, flush=True)
        faults.driver.terminate()
        printed, _ = faults.driver.communicate(timeout=180)
        assert faults.driver.returncode == 130, printed
    steps = len(read_metrics(store))
    repeated = [event["redone"] for event in attempts(store) if event.get("redone")]
    restarts = [
        event for event in read_events(store) if event["event"] == "failure" and not event["in_place"]
    ]
    assert len(repeated) <= len(restarts) + order.count("kill_driver")
    reference = train_alone(elastic_recipe, scenes, tmp_path / "whole", steps, *endless)
    assert_same_model(store, reference)
    assert_each_place_once(store, scenes, elastic_recipe, steps, *endless)


def train_alone(recipe: Path, dataset: Dataset, out: Path, steps: int, *overrides: str) -> Store:
    """Train so many steps in one process, without a fault."""
    alone = ("workers=1", "micro_batch=12", "checkpoint.snapshots=null", *overrides)
    config, run = open_run(str(out), load_config(PretrainConfig, recipe, alone), dataset)
    create_run(config, run, dataset)
    pretrain(config, dataset, run, Worker(), Callbacks(request_after(steps - 1, Request.SAVE)))
    assert committed_steps(run.store)[-1] == steps
    return run.store


def test_twenty_faults(
    cluster: Cluster,
    elastic_recipe: Path,
    photographs: Dataset,
    s3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """20 faults of all kinds, while the data comes from S3 through a proxy that makes a tenth of all requests fail."""
    longer = ("epochs=100", "checkpoint.every_steps=400")  # of 20 steps
    out = open_store(str(tmp_path / "whole"))
    config, run = open_run(
        out.url, load_config(PretrainConfig, elastic_recipe, ("workers=1", *longer)), photographs
    )
    create_run(config, run, photographs)
    assert pretrain(config, photographs, run, Worker(), Callbacks())

    remote, rng, store = open_store(f"{s3}/soak"), random.Random(4), open_store(str(tmp_path / "run"))
    for name in sorted(photographs.store.names(), key=lambda name: name == "manifest.json"):
        remote.write(name, photographs.store.read(name))
    with fault_proxy(urlsplit(os.environ["AWS_ENDPOINT_URL"]).port or 0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.share, proxy.faults = 0.1, ("reset", "short", SLOW_DOWN)
        command = ("pretrain", "--config", elastic_recipe, "--data", remote.url, "--out", store.root)
        faults = Faults(cluster, (*command, "--ledger", *longer), store, rng)
        with faults.stack:
            wait_until(lambda: attempts(store))
            order = [*FAULTS, *rng.choices(FAULTS, k=20 - len(FAULTS))]
            for fault in rng.sample(order, len(order)):
                time.sleep(rng.uniform(0.5, 4))
                workers = attempts(store)[-1]["world_size"]
                faults.do(fault)
                # After the loss of all workers, surviving snapshots are some steps old. Steps take 50 ms here. If the node of a
                # single worker is lost, so is the only snapshot, and the run continues from its last checkpoint.
                if workers > 1 or fault != "kill_node":
                    assert attempts(store)[-1].get("redone", 0) <= 40, fault
                print(fault, faults.memory[-1], attempts(store)[-1], flush=True)
            printed, _ = faults.driver.communicate(timeout=1200)
            assert faults.driver.returncode == 0, printed
        assert proxy.injected > 100
    assert_same_model(store, out)
    assert_each_place_once(store, photographs, elastic_recipe, len(read_metrics(out)), *longer)
    assert not snapshots(store).exists()
    state = size(Path(store.root) / "checkpoints") / len(committed_steps(store))
    # Each of three nodes has a finished snapshot and one that is being written, both with metrics; a lost node's
    # snapshots may exist until there is a newer one.
    assert max(seen["shm"] for seen in faults.memory) < 8 * state + 100e6
    assert (
        max(seen["driver"] for seen in faults.memory[10:])
        < max(seen["driver"] for seen in faults.memory[:10]) + 50e6
    )
