"""A run on a cluster of real raylets on this machine, and what is done to it."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load

from cluster.elastic import preemption
from pipeline.dataset.dataset import Dataset
from pipeline.storage.store import Store
from tests.support.runs import kill, running, wait_until, workers_of
from trainer.config.recipe import load_config
from trainer.config.schema import PretrainConfig
from trainer.run.events import read_events
from trainer.run.metrics import read_metrics
from trainer.run.run import make_order

SMALL = {"object_store_memory": 80_000_000, "include_dashboard": False}  # settings of a node


def final_weights(store: Store) -> dict[str, torch.Tensor]:
    steps = sorted(name for name in store.names("checkpoints") if name.endswith("model.safetensors"))
    return load(store.read(steps[-1]))


def assert_same_model(store: Store, reference: Store) -> None:
    """Check that the newest weights of two runs in float64 are equal to 1e-9."""
    ours, expected = final_weights(store), final_weights(reference)
    apart = max(float((ours[name] - expected[name]).abs().max()) for name in expected)
    assert ours.keys() == expected.keys()
    assert apart <= 1e-9


def assert_each_place_once(store: Store, dataset: Dataset, recipe: Path, steps: int, *overrides: str) -> None:
    """Check the ledger: `steps` steps, each with its samples, and in an epoch none twice."""
    config = load_config(PretrainConfig, recipe, overrides)
    order = make_order(config, dataset)
    rows = read_metrics(store)
    assert [row["step"] for row in rows] == list(range(steps))
    epochs: dict[int, list[int]] = {}
    for row in rows:
        assert sorted(row["sample_ids"]) == sorted(order.step_ids(row["step"], 0, 1).tolist())
        epochs.setdefault(row["epoch"], []).extend(row["sample_ids"])
    for places in epochs.values():
        assert len(places) == len(set(places))


def attempts(store: Store) -> list[dict[str, Any]]:
    return [event for event in read_events(store) if event["event"] == "attempt"]


def snapshots(store: Store) -> Path:
    return Path("/dev/shm", f"maestream-{json.loads(store.read('run.json'))['run_id']}")


class Faults:
    """Injects random faults into a run on a cluster of up to three nodes."""

    def __init__(
        self, cluster: Cluster, command: tuple[object, ...], store: Store, rng: random.Random
    ) -> None:
        self.cluster, self.command, self.store, self.rng = cluster, command, store, rng
        self.nodes = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(2)]
        self.stack = contextlib.ExitStack()
        self.driver = self.stack.enter_context(running(command))
        self.memory: list[dict[str, int]] = []  # bytes in use after each fault
        self.dark: list[int] = []  # processes of nodes without power

    def do(self, fault: str, steps: int | None = None) -> None:
        """Inject one fault, and wait until the next attempt trains, or until so many more steps are done."""
        before = len(attempts(self.store))
        getattr(self, fault)()
        done = len(read_metrics(self.store))

        def recovered() -> bool:
            if steps is None:
                return len(attempts(self.store)) > before
            return len(read_metrics(self.store)) >= done + steps

        wait_until(lambda: recovered() or self.driver.poll() is not None)
        assert self.driver.poll() is None, self.driver.communicate()[0]
        while self.dark:
            with contextlib.suppress(ProcessLookupError):
                kill(self.dark.pop())
        self.memory.append({"shm": size(snapshots(self.store)), "driver": resident(self.driver.pid)})

    # ---- one worker

    def kill_worker(self) -> None:
        kill(self.rng.choice(self.workers()))

    def stop_worker(self) -> None:
        os.kill(self.rng.choice(self.workers()), signal.SIGSTOP)

    def kill_two_workers(self) -> None:
        kill(*self.rng.sample(self.workers(), min(2, len(self.workers()))))

    def kill_a_worker_while_the_others_regroup(self) -> None:
        kill(self.rng.choice(self.workers()))
        time.sleep(self.rng.uniform(0, 0.5))
        if left := self._workers():
            kill(self.rng.choice(left))

    def kill_a_worker_that_joins(self) -> None:
        """Kill one, and the one that replaces it at some time of its start."""
        before = set(self.workers())
        kill(self.rng.choice(sorted(before)))
        new: set[int] = set()
        wait_until(lambda: new.update(set(self._workers()) - before) or new or self.driver.poll() is not None)
        time.sleep(self.rng.uniform(0, 4))
        with contextlib.suppress(ProcessLookupError):
            kill(*new)

    # ---- nodes

    def kill_node(self) -> None:
        node = self._gone()
        shutil.rmtree(snapshots(self.store) / node.node_id, ignore_errors=True)
        node.kill_raylet()
        shutil.rmtree(snapshots(self.store) / node.node_id, ignore_errors=True)
        self.nodes.append(self.cluster.add_node(num_cpus=1, **SMALL))

    def cut_power_of_node(self) -> None:
        """No process of the node ends and no connection closes, but nothing answers any more."""
        node = self._gone()
        raylet = node.all_processes["raylet"][0].process.pid
        self.dark = [*workers_of(raylet), raylet]
        for pid in self.dark:
            os.kill(pid, signal.SIGSTOP)
        self.nodes.append(self.cluster.add_node(num_cpus=1, **SMALL))

    def drain_node(self) -> None:
        node = self._gone()
        assert preemption.drain(node.node_id, "needed elsewhere", 60)
        self.nodes.append(self.cluster.add_node(num_cpus=1, **SMALL))

    def drain_node_while_one_joins(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, **SMALL))
        time.sleep(self.rng.uniform(0, 5))
        assert preemption.drain(self._gone().node_id, "needed elsewhere", 60)

    def add_node(self) -> None:
        if len(self.nodes) == 3:
            self.kill_node()
        else:
            self.nodes.append(self.cluster.add_node(num_cpus=1, **SMALL))

    # ---- all

    def kill_all_workers(self) -> None:
        kill(*self.workers())

    def kill_driver(self) -> None:
        kill(self.driver.pid)
        self._again()

    def stop_job(self) -> None:
        self.driver.send_signal(signal.SIGTERM)
        self.driver.communicate(timeout=180)
        self._again()

    def workers(self) -> list[int]:
        """Pids of the workers, as soon as there is one."""
        wait_until(self._workers)
        return self._workers()

    def _workers(self) -> list[int]:
        return [pid for node in self.nodes for pid in workers_of(node.all_processes["raylet"][0].process.pid)]

    def _gone(self) -> Any:
        return self.nodes.pop(self.rng.randrange(len(self.nodes)))

    def _again(self) -> None:
        self.stack.close()
        self.driver = self.stack.enter_context(running(self.command))


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def resident(pid: int) -> int:
    """Return the memory that only this process uses, in bytes."""
    return int(psutil.Process(pid).memory_full_info().uss)
