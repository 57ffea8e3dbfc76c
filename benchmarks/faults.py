"""What benchmarks.elasticity does to a cluster and to the command that trains on it."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.raylets import ROOT, Node, Raylets, descendants, has_open, kill, wait_until
from benchmarks.steps import Step, Watch
from benchmarks.stock import STEPS
from trainer.metrics import METRICS

ROWS = {"ours": METRICS, "stock": STEPS}  # in a side's folder: the file that gets a row a step
PATIENCE_S = 240.0  # for steps to come, before they count as never
NOTICE_S = 30  # as GCP and Azure give, and `ray start` on SIGTERM
STOP_S = {"ours": 60.0, "stock": 3.0}  # RAY_JOB_STOP_WAIT_TIME_S: as our README says, and as Ray has it


class Job:
    """The command of one side, which can be stopped and started again.

    Args:
        out: its folder; it is empty.
    """

    def __init__(
        self, side: str, command: list[str], out: Path, log: Path, environment: dict[str, str]
    ) -> None:
        self.side, self.command, self.out, self.log, self.environment = side, command, out, log, environment
        self.watch = Watch(out / ROWS[side])
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=self.environment,
                cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"it ended with {self.process.returncode}: {self.log.read_text()[-1500:]}")

    def wait_for_steps(self, enough: Callable[[list[Step]], bool], what: str) -> None:
        def look() -> bool:
            if enough(self.watch.steps):
                return True
            self.check_alive()
            return False

        wait_until(look, PATIENCE_S, what)


@dataclass(frozen=True)
class Stage:
    """What a fault is given."""

    cluster: Raylets
    job: Job

    def leader(self) -> int:
        """Pid of rank 0: it alone writes."""
        workers = [pid for node in self.cluster.nodes for pid in node.train_workers()]
        return next(pid for pid in workers if has_open(pid, self.job.out))

    def node(self, of_leader: bool) -> Node:
        """Rank 0's node, or another."""
        leader = self.leader()
        return next(n for n in self.cluster.nodes if (leader in descendants(n.raylet)) == of_leader)

    def follower(self) -> int:
        """Pid of a worker that is not rank 0."""
        return self.node(of_leader=False).train_workers()[0]

    def forget(self, *nodes: Node) -> None:
        """Delete the snapshots of nodes that are gone."""
        for node in nodes:
            for folder in Path("/dev/shm").glob(f"maestream-{run_id(self.job.out)}/{node.node_id}"):
                shutil.rmtree(folder)

    def kill_node(self, node: Node) -> None:
        self.cluster.kill(node)
        self.forget(node)


def run_id(out: Path) -> str:
    """Stock has none."""
    path = out / "run.json"
    return str(json.loads(path.read_text())["run_id"]) if path.exists() else "none"


def kill_worker(stage: Stage) -> None:
    kill(stage.follower())


def stop_worker(stage: Stage) -> None:
    kill(stage.follower(), sig=signal.SIGSTOP)


def kill_raylet(stage: Stage) -> None:
    stage.kill_node(stage.node(of_leader=False))


def kill_leaders_raylet(stage: Stage) -> None:
    stage.kill_node(stage.node(of_leader=True))


def give_notice(stage: Stage) -> None:
    """As a cloud: the node is gone when the time is over, whether it has been left or not."""
    node, begin = stage.node(of_leader=True), time.monotonic()
    stage.cluster.notice(node, NOTICE_S)
    time.sleep(max(begin + NOTICE_S - time.monotonic(), 0))
    stage.kill_node(node)


def terminate_node(stage: Stage) -> None:
    node = stage.node(of_leader=True)
    stage.cluster.terminate(node, NOTICE_S + 10)
    stage.forget(node)


def add_node(stage: Stage) -> None:
    stage.cluster.add()


def lose_all_nodes(stage: Stage) -> None:
    gone = list(stage.cluster.nodes)
    kill(*(node.raylet for node in gone))
    for node in gone:
        stage.cluster.kill(node)
    stage.forget(*gone)
    stage.cluster.add(len(gone))


def kill_driver(stage: Stage) -> None:
    stage.job.process.kill()
    stage.job.process.wait()
    stage.job.start()


def stop_job(stage: Stage) -> None:
    stage.job.process.terminate()
    try:
        stage.job.process.wait(STOP_S[stage.job.side])
    except subprocess.TimeoutExpired:
        stage.job.process.kill()
        stage.job.process.wait()
    stage.job.start()
