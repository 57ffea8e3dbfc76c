"""The faults that benchmarks.elasticity injects into a cluster and the command that trains on it."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.elasticity.ray_cluster import (
    ROOT,
    Node,
    RayCluster,
    descendants,
    has_open,
    is_alive,
    kill,
    wait_until,
)
from benchmarks.elasticity.step_log import Step, StepWatcher
from benchmarks.elasticity.stock_ray import STEPS
from trainer.run.metrics import METRICS

ROWS = {
    "in place": METRICS,
    "restart": METRICS,
    "stock": STEPS,
}  # in a side's folder: the file with a row per step
PATIENCE_S = 240.0  # a side that makes no progress for so long has failed
CUT_S = 15.0
NOTICE_S = 30  # as on GCP and Azure, and of `ray start` on SIGTERM
# RAY_JOB_STOP_WAIT_TIME_S: as docs/guides/elastic.md recommends, and Ray's default
STOP_S = {"in place": 60.0, "restart": 60.0, "stock": 3.0}


class SideJob:
    """The command of one side, which can be stopped and started again.

    Args:
        side: see `benchmarks.elasticity`.
        out: its folder, empty at the start.
        log: file for its output.
    """

    def __init__(
        self, side: str, command: list[str], out: Path, log: Path, environment: dict[str, str]
    ) -> None:
        self.side, self.command, self.out, self.log, self.environment = side, command, out, log, environment
        self.watch = StepWatcher(out / ROWS[side])
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=self.environment,
                cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(
                f"the command ended with exit code {self.process.returncode}: {self.log.read_text()[-1500:]}"
            )

    def wait_for_steps(self, enough: Callable[[list[Step]], bool], what: str) -> None:
        def has_enough() -> bool:
            if enough(self.watch.steps):
                return True
            self.check_alive()
            return False

        wait_until(has_enough, PATIENCE_S, what)


@dataclass(frozen=True)
class FaultTarget:
    """The cluster and the command that a fault is injected into."""

    cluster: RayCluster
    job: SideJob

    def workers(self) -> set[int]:
        """Pids of all workers."""
        return {pid for node in self.cluster.nodes for pid in node.train_workers()}

    def leader(self) -> int:
        """Pid of rank 0, the only one that writes to the folder."""
        return next(pid for pid in self.workers() if has_open(pid, self.job.out))

    def node(self, of_leader: bool) -> Node:
        """The node of rank 0, or another one."""
        leader = self.leader()
        return next(n for n in self.cluster.nodes if (leader in descendants(n.raylet)) == of_leader)

    def follower(self) -> int:
        """Pid of a worker that is not rank 0."""
        return self.node(of_leader=False).train_workers()[0]

    def delete_snapshots(self, *nodes: Node) -> None:
        """Delete the snapshots of lost nodes."""
        for node in nodes:
            for folder in Path("/dev/shm").glob(f"maestream-{run_id(self.job.out)}/{node.node_id}"):
                shutil.rmtree(folder)

    def kill_node(self, node: Node) -> None:
        self.cluster.kill(node)
        self.delete_snapshots(node)


def run_id(out: Path) -> str:
    """The run id of a run of maestream; "none" for stock."""
    path = out / "run.json"
    return str(json.loads(path.read_text())["run_id"]) if path.exists() else "none"


def kill_worker(target: FaultTarget) -> None:
    kill(target.follower())


def kill_first_worker(target: FaultTarget) -> None:
    kill(target.leader())


def stop_worker(target: FaultTarget) -> None:
    kill(target.follower(), sig=signal.SIGSTOP)


def kill_node(target: FaultTarget) -> None:
    target.kill_node(target.node(of_leader=False))


def kill_first_node(target: FaultTarget) -> None:
    target.kill_node(target.node(of_leader=True))


def cut_power(target: FaultTarget) -> None:
    """Nothing on a node runs any more, and no connection closes."""
    node = target.node(of_leader=False)
    target.cluster.freeze(node)
    target.delete_snapshots(node)


def cut_network(target: FaultTarget) -> None:
    """The last node cannot reach the others for CUT_S, although all processes run. It sees the run's folder all the time."""
    link, node = target.cluster.link, target.cluster.nodes.pop()
    assert link
    workers = node.train_workers()
    link.cut()
    time.sleep(CUT_S)
    link.restore()
    wait_until(lambda: not any(map(is_alive, workers)), PATIENCE_S, "end of the worker that was cut off")
    target.delete_snapshots(node)


def send_notice(target: FaultTarget) -> None:
    """A preemption notice as in a cloud: the node is lost when the time is over, whether or not the run has left it."""
    node, begin = target.node(of_leader=True), time.monotonic()
    target.cluster.notice(node, NOTICE_S)
    time.sleep(max(begin + NOTICE_S - time.monotonic(), 0))
    target.kill_node(node)


def terminate_node(target: FaultTarget) -> None:
    node = target.node(of_leader=True)
    target.cluster.terminate(node, NOTICE_S + 10)
    target.delete_snapshots(node)


def add_node(target: FaultTarget) -> None:
    target.cluster.add()


def lose_all_nodes(target: FaultTarget) -> None:
    gone = list(target.cluster.nodes)
    target.cluster.kill(*gone)
    target.delete_snapshots(*gone)
    target.cluster.add(len(gone))


def kill_driver(target: FaultTarget) -> None:
    target.job.process.kill()
    target.job.process.wait()
    target.job.start()


def stop_job(target: FaultTarget) -> None:
    target.job.process.terminate()
    try:
        target.job.process.wait(STOP_S[target.job.side])
    except subprocess.TimeoutExpired:
        target.job.process.kill()
        target.job.process.wait()
    target.job.start()
