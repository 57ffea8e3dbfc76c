"""A Ray cluster on this machine of real `ray start --block` processes, whose parts can be killed one by one.

A head without CPUs, and nodes of one CPU each. Whatever dies in whichever way, leaving the context leaves no process
behind: orphans become children of this process (prctl(2), PR_SET_CHILD_SUBREAPER), and all that has come below it goes.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PR_SET_CHILD_SUBREAPER = 36
OBJECT_STORE_BYTES = 80_000_000  # of each node; Ray's least is 75 MiB
UP_S = 60.0  # a node is up after that, or never
RAY = Path(sys.executable).with_name("ray")


def wait_until(true: Callable[[], object], seconds: float, what: str, poll_s: float = 0.05) -> None:
    """TimeoutError if that does not come true in so many seconds."""
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
    """Empty if there is no such process any more."""
    try:
        return list(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return []


def descendants(pid: int) -> list[int]:
    """The living processes below `pid`."""
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process.pid for process in below if is_alive(process.pid)]


def running_others() -> list[int]:
    """The processes that are neither this one nor below it, and run or wait for a core."""
    ours = {os.getpid(), *descendants(os.getpid())}
    everyone = psutil.process_iter(["status"])
    return [p.pid for p in everyone if p.info["status"] == psutil.STATUS_RUNNING and p.pid not in ours]


def kill(*pids: int, sig: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sig)


def has_open(pid: int, folder: Path) -> bool:
    """Whether a process has a file in `folder` open."""
    try:
        return any(Path(file.path).is_relative_to(folder) for file in psutil.Process(pid).open_files())
    except psutil.NoSuchProcess:
        return False


# ---- the cluster


@dataclass(frozen=True)
class Node:
    starter: "subprocess.Popen[bytes]"  # `ray start --block`
    raylet: int  # pid
    node_id: str  # Ray's, hexadecimal

    def train_workers(self) -> list[int]:
        """Pids of Ray Train's workers on this node."""
        return [pid for pid in descendants(self.raylet) if "RayTrainWorker" in " ".join(command_line(pid))]


class Raylets:
    """The cluster, from entering to leaving the context.

    Args:
        logs: folder for what `ray start` prints.
        head_settings: environment of the head alone.
    """

    def __init__(self, logs: Path, head_settings: dict[str, str]) -> None:
        self.logs, self.head_settings = logs, head_settings
        self.nodes: list[Node] = []  # those that were not killed
        self.started = 0
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def __enter__(self) -> "Raylets":
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
        self.before = set(descendants(os.getpid()))
        self.folder = tempfile.mkdtemp(prefix="el-", dir="/tmp")  # a socket's path is 107 bytes at most
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
        return f"127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What every process of the cluster, and every driver, is started with."""
        mine = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        return {**os.environ, **mine, "RAY_ADDRESS": self.address}

    def add(self, count: int = 1) -> None:
        """Start so many nodes more, and wait until they are up: one after another, or they take each other's sockets."""
        for _ in range(count):
            self.nodes.append(self._start([f"--address={self.address}", "--num-cpus=1"]))

    def _start(self, settings: list[str], more: dict[str, str] | None = None) -> Node:
        environment = self.environment() | (more or {})
        del environment["RAY_ADDRESS"]
        log = self.logs / f"node-{self.started}.log"
        self.started += 1
        own = ["--block", "--min-worker-port=0", "--max-worker-port=0"]
        command = [str(RAY), "start", *settings, *own, f"--object-store-memory={OBJECT_STORE_BYTES}"]
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
        raise RuntimeError(f"{log}: there is no raylet below `ray start`")

    def kill(self, node: Node) -> None:
        """SIGKILL a node's raylet, and wait until what ran there has noticed: its workers, and `ray start` itself."""
        self.nodes.remove(node)
        below = descendants(node.starter.pid)
        kill(node.raylet)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(map(is_alive, below)), 5, "end of a node")
        kill(*filter(is_alive, below), node.starter.pid)  # the machine is gone
        node.starter.wait()

    def notice(self, node: Node, seconds: int) -> None:
        """Tell the cluster that a node will be taken away after so many seconds, as who watches a cloud's notice does."""
        subprocess.run(
            [RAY, "drain-node", f"--address={self.address}", f"--node-id={node.node_id}",
             "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken away",
             f"--deadline-remaining-seconds={seconds}"],
            check=True, capture_output=True, env=self.environment(),
        )  # fmt: skip

    def terminate(self, node: Node, seconds: float) -> None:
        """SIGTERM `ray start --block`, as the end of a Kubernetes pod does, and wait; SIGKILL all after so many seconds."""
        self.nodes.remove(node)
        below = descendants(node.starter.pid)
        node.starter.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.starter.wait(seconds)
        kill(*filter(is_alive, below), node.starter.pid)
        node.starter.wait()
