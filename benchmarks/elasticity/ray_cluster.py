"""A Ray cluster on this machine made of real `ray start --block` processes, whose nodes can be killed one by one.

It has a head without CPUs, and nodes with one CPU each. No process outlives the context, however it was orphaned:
orphans become children of this process (prctl(2), PR_SET_CHILD_SUBREAPER), which kills all its descendants at the end.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.elasticity.partition import HERE, THERE, Link

ROOT = Path(__file__).parents[2]
PR_SET_CHILD_SUBREAPER = 36
OBJECT_STORE_BYTES = 80_000_000  # of each node; Ray's minimum is 75 MiB
UP_S = 60.0  # longest time for a node to start
RAY = Path(sys.executable).with_name("ray")


def wait_until(true: Callable[[], object], seconds: float, what: str, poll_s: float = 0.05) -> None:
    """Wait until a condition holds. TimeoutError if it does not within `seconds`; `what` names it in the message."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not in {seconds:g} s")
        time.sleep(poll_s)


# ---- processes


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def command_line(pid: int) -> list[str]:
    """The arguments of a process; empty if it has ended."""
    try:
        return list(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return []


def descendants(pid: int) -> list[int]:
    """The pids of all running descendants of a process."""
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process.pid for process in below if is_alive(process.pid)]


def other_running_processes() -> list[int]:
    """Pids of processes that run or wait for a core, other than this process and its descendants."""
    ours = {os.getpid(), *descendants(os.getpid())}
    everyone = psutil.process_iter(["status"])
    return [p.pid for p in everyone if p.info["status"] == psutil.STATUS_RUNNING and p.pid not in ours]


def kill(*pids: int, sig: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sig)


def has_open(pid: int, folder: Path) -> bool:
    """Whether a process has an open file in `folder`."""
    try:
        return any(Path(file.path).is_relative_to(folder) for file in psutil.Process(pid).open_files())
    except psutil.NoSuchProcess:
        return False


# ---- the cluster


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    starter: "subprocess.Popen[bytes]"  # `ray start --block`
    raylet: int  # pid
    node_id: str  # Ray's id, hexadecimal

    def train_workers(self) -> list[int]:
        """Pids of the Ray Train workers on this node."""
        return [pid for pid in descendants(self.raylet) if "RayTrainWorker" in " ".join(command_line(pid))]


class RayCluster:
    """A cluster that runs from entering to leaving the context.

    Args:
        logs: folder for the output of `ray start`.
        head_settings: environment variables for the head only.
        link: for nodes in its network namespace; None: there are none.
    """

    def __init__(self, logs: Path, head_settings: dict[str, str], link: Link | None = None) -> None:
        self.logs, self.head_settings, self.link = logs, head_settings, link
        self.host = HERE if link else "127.0.0.1"
        self.nodes: list[Node] = []  # running ones
        self.started = 0
        with socket.create_server((self.host, 0)) as free:
            self.port = free.getsockname()[1]

    def __enter__(self) -> "RayCluster":
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
        self.before = set(descendants(os.getpid()))
        self.folder = tempfile.mkdtemp(
            prefix="el-", dir="/tmp"
        )  # short, because a socket's path has at most 107 bytes
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            settings = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--num-cpus=0",
                        "--include-dashboard=false"]  # fmt: skip
            self._start(settings, self.head_settings)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while left := set(descendants(os.getpid())) - self.before:
            kill(*left)
            time.sleep(0.05)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def environment(self) -> dict[str, str]:
        """The environment variables of every process of the cluster and of every driver."""
        mine = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        return {**os.environ, **mine, "RAY_ADDRESS": self.address}

    def add(self, count: int = 1) -> None:
        """Start more nodes and wait until they are up. One after another, because nodes that start together take each other's
        ports."""
        for _ in range(count):
            self.nodes.append(self._start([f"--address={self.address}", "--num-cpus=1"]))

    def add_beyond_link(self) -> None:
        """Start a node in the link's network namespace."""
        self.nodes.append(self._start([f"--address={self.address}", "--num-cpus=1"], beyond=True))

    def _start(self, settings: list[str], more: dict[str, str] | None = None, beyond: bool = False) -> Node:
        environment = self.environment() | (more or {})
        del environment["RAY_ADDRESS"]
        log = self.logs / f"node-{self.started}.log"
        self.started += 1
        own = ["--block", "--min-worker-port=0", "--max-worker-port=0"]
        command = [str(RAY), "start", *settings, *own, f"--object-store-memory={OBJECT_STORE_BYTES}"]
        if self.link:
            command.append(f"--node-ip-address={THERE if beyond else HERE}")
            command = self.link.command(command) if beyond else command
        with log.open("wb") as file:
            starter = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
        wait_until(
            lambda: starter.poll() is not None or "Ray runtime started" in log.read_text(),
            UP_S,
            f"`ray start`, see {log}",
        )
        if starter.poll() is not None:
            raise RuntimeError(f"`ray start` ended with {starter.returncode}: {log.read_text()[-2000:]}")
        for pid in descendants(starter.pid):
            words = command_line(pid)
            if words and words[0].endswith("/raylet"):
                ids = [word.partition("=")[2] for word in words if word.startswith("--node_id=")]
                return Node(starter, pid, ids[0])
        raise RuntimeError(f"{log}: `ray start` has started no raylet")

    def kill(self, *nodes: Node) -> None:
        """Kill all processes of nodes at once, as if the machines were lost, but their connections close."""
        self._signal(signal.SIGKILL, nodes)
        for node in nodes:
            node.starter.wait()

    def freeze(self, node: Node) -> None:
        """Stop all processes of a node, as if its power were cut: its connections do not close."""
        self._signal(signal.SIGSTOP, [node])

    def _signal(self, sig: signal.Signals, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self.nodes.remove(node)
        processes = [pid for node in nodes for pid in (*descendants(node.starter.pid), node.starter.pid)]
        kill(*processes, sig=sig)

    def notice(self, node: Node, seconds: int) -> None:
        """Tell Ray that a node will be preempted after so many seconds, as a watcher of the cloud's notices does."""
        subprocess.run(
            [RAY, "drain-node", f"--address={self.address}", f"--node-id={node.node_id}",
             "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=preempted",
             f"--deadline-remaining-seconds={seconds}"],
            check=True, capture_output=True, env=self.environment(),
        )  # fmt: skip

    def terminate(self, node: Node, seconds: float) -> None:
        """Send SIGTERM to `ray start --block`, as Kubernetes does at the end of a pod; SIGKILL after so many seconds."""
        self.nodes.remove(node)
        below = descendants(node.starter.pid)
        node.starter.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.starter.wait(seconds)
        kill(*filter(is_alive, below), node.starter.pid)
        node.starter.wait()
