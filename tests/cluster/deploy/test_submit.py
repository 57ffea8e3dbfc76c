"""`maestream submit`, with a real cluster: a head with its job server, and a node for workers, by `ray start`."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
import ray

from cluster.deploy.submit import MAX_BYTES, entrypoint, staged
from cluster.elastic.prometheus import METRICS
from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.command_line import maestream, refused
from tests.support.paths import ROOT
from tests.support.runs import losses, wait_until
from trainer.run.checkpoint import committed_steps
from trainer.run.events import read_events

pytestmark = pytest.mark.integration

RECIPE = """
global_batch: 12
epochs: 4000          # of 5 steps: more than these tests train
log_every: 5
precision: float64
micro_batch: 1        # for steps of some 30 ms
model: {image_size: 48, patch_size: 8, width: 48, depth: 2, heads: 3,
        decoder_width: 32, decoder_depth: 1, decoder_heads: 2}
optim: {blr: 0.05, warmup_epochs: 1}
data: {lanes: 6, block: 8}
checkpoint: {every_steps: 20}
"""
JOB = ("pretrain", "--config", "small.yaml")
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git checkout with a recipe."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "small.yaml").write_text(RECIPE)
    (folder / ".gitignore").write_text("secret.txt\n*.so\n")
    (folder / "secret.txt").write_text("s3cr3t")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


# ---- without a cluster


def test_files_that_git_does_not_ignore_are_uploaded(tree: Path) -> None:
    compiled = tree / "pipeline/decode/jpeg_crop.so"
    compiled.parent.mkdir(parents=True)
    compiled.write_bytes(b"compiled")
    with staged(tree) as copy:
        names = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
        assert names == ["pipeline/decode/jpeg_crop.so", "small.yaml"]
        assert (copy / "small.yaml").read_text() == RECIPE
    assert not copy.exists()
    with (tree / "large").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with (
        pytest.raises(UserError, match=r"at most 105 MB .* to \.gitignore .the largest is large, 105 MB"),
        staged(tree),
    ):
        pass


def test_commands_that_cannot_run_on_the_cluster_are_refused(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    here = ("submit", "--address", "http://127.0.0.1:1", "--")
    there = ("--data", "s3://bucket/data", "--out", "s3://bucket/run")
    assert "no job server responds" in refused(*here, *JOB, *there)
    assert "for example http://head:8265" in refused("submit", "--address", "head:8265", "--", *JOB, *there)
    assert "trane: not a command that can run as a job" in refused(*here, "trane")
    assert "does not exist on the cluster" in refused(
        *here, *JOB, "--data", "shards", "--out", "s3://bucket/run"
    )
    assert "does not exist on the cluster" in refused(
        *here, "knn", "runs/a", "--data", "s3://b/d", "--val", "s3://b/v"
    )
    in_a_recipe = refused(*here, *JOB, *there, "knn={val: shards/val}")
    assert "knn.val shards/val: this relative path does not exist on the cluster" in in_a_recipe
    (tree / "probe.yaml").write_text("task: linprobe\ninit: {run: runs/base}\ndata: {val: s3://bucket/val}\n")
    probe = ("linprobe", "--config", "probe.yaml", *there)
    assert "init.run runs/base: this relative path" in refused(*here, *probe)
    assert "data.val ~/val: this relative path" in refused(
        *here, *probe, "--val", "~/val", "--init", "scratch"
    )
    assert "no job server responds" in refused(*here, *probe, "--init", "/mnt/runs/base")
    assert "no such config" in refused(*here, "pretrain", "--config", "none.yaml", *there)
    assert "must be in the current folder" in refused(*here, "pretrain", "--config", "/etc/x.yaml", *there)
    assert "did you mean epochs?" in refused(*here, *JOB, *there, "epoch=3")
    assert "mount a secret" in refused(
        *here, *JOB, "--data", "s3://key:word@bucket/d", "--out", "s3://bucket/r"
    )
    for secret in ("AWS_SECRET_ACCESS_KEY=x", "HF_TOKEN=x", "PLAIN=AKIAABCDEFGHIJKLMNOP"):
        assert "mount a secret" in refused(*here[:-1], "--env", secret, "--", *JOB, *there)
    assert "expected NAME=VALUE" in refused(*here[:-1], "--env", "PLAIN", "--", *JOB, *there)


@pytest.mark.parametrize(("theirs", "python"), [("2.59.0", "3.11.7"), (ray.__version__, "3.9.1")])
def test_another_version_is_refused(
    theirs: str, python: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old(BaseHTTPRequestHandler):
        """Answers as a job server of that version does."""

        def do_GET(self) -> None:
            version = {"version": "4", "ray_version": theirs, "ray_commit": "", "session_name": ""}
            answer = (
                version
                if self.path == "/api/version"
                else {"data": {"rayVersion": theirs, "pythonVersion": python}}
            )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None: ...

    monkeypatch.chdir(tree)
    with HTTPServer(("127.0.0.1", 0), Old) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        output = refused(
            "submit", "--address", address, "--", *JOB, "--data", "s3://b/d", "--out", "s3://b/r"
        )
        server.shutdown()
    assert (
        f"has Ray {theirs} and Python {python.rpartition('.')[0]}, but this machine has Ray {ray.__version__}"
        in output
    )


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [
        ([1, 1, 0], 3, 0),
        ([1, 1, 1, 1], 3, 1),
        ([2], 1, 2),
        ([130], 1, 130),
        ([1, 2], 2, 2),
        ([0], 1, 0),
        ([137, 143], 2, 143),
    ],
)
def test_only_a_crash_is_retried(codes: list[int], starts: int, code: int, tmp_path: Path) -> None:
    program = tmp_path / "maestream"  # exits with each of the codes in turn
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/words\n'
        f"n=$(wc -l < {tmp_path}/words)\nexit $(echo {' '.join(map(str, codes))} | cut -d' ' -f$n)\n"
    )
    program.chmod(0o755)
    command = entrypoint(("pretrain", "a b", "$x"), retry=2)
    done = subprocess.run(
        command, shell=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=False
    )
    assert done.returncode == code
    assert (tmp_path / "words").read_text() == "pretrain a b $x\n" * starts


def test_a_stopped_command_is_not_retried(tmp_path: Path) -> None:
    """Even if its exit code is that of a crash."""
    program = tmp_path / "maestream"
    program.write_text(
        f"#!/bin/sh\ntrap 'exit 1' TERM\necho >> {tmp_path}/starts\nwhile :; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    job = subprocess.Popen(
        entrypoint(("pretrain",), retry=5), shell=True, start_new_session=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    wait_until(lambda: (tmp_path / "starts").exists())
    os.killpg(job.pid, signal.SIGTERM)  # as Ray does
    assert job.wait(30) == 1
    assert (tmp_path / "starts").read_text() == "\n"


# ---- with a cluster


@dataclass(frozen=True)
class RayCluster:
    address: str  # of the job server
    metrics: str  # where Prometheus would scrape the head
    environment: dict[str, str]

    def scraped(self) -> dict[str, float]:
        """Return the values of maestream's metrics, by name."""
        with urllib.request.urlopen(self.metrics, timeout=10) as answer:
            text = answer.read().decode()
        return {
            name: float(value)
            for name, value in re.findall(r"^ray_maestream_(\w+)\{.*\} (\S+)$", text, re.MULTILINE)
        }

    def ray(self, *words: str) -> str:
        command = [str(Path(sys.executable).with_name("ray")), *words, "--address", self.address]
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head without CPUs and a node with two. Access needs a token."""
    ports = []
    for _ in range(5):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    known = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment = {
        **os.environ,
        **known,
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    logs = tmp_path_factory.mktemp("ray")
    program = str(Path(sys.executable).with_name("ray"))
    head = [
        "--head",
        f"--port={ports[0]}",
        f"--dashboard-port={ports[1]}",
        f"--metrics-export-port={ports[2]}",
        "--num-cpus=0",
    ]
    started = []
    try:
        for i, words in enumerate((head, [f"--address=127.0.0.1:{ports[0]}", "--num-cpus=2"])):
            command = [program, "start", "--block", "--object-store-memory=80000000", *words]
            # The agent starts the jobs. Its default port may be taken by another Ray on this machine.
            command.append(f"--dashboard-agent-listen-port={ports[3 + i]}")
            log = logs / f"{i}.log"
            with log.open("wb") as file:
                started.append(
                    subprocess.Popen(
                        command, stdout=file, stderr=file, env=environment, start_new_session=True
                    )
                )
            wait_until(lambda log=log: "Ray runtime started" in log.read_text(), 60)
        yield RayCluster(f"http://127.0.0.1:{ports[1]}", f"http://127.0.0.1:{ports[2]}/metrics", known)
    finally:
        below = [child for node in started for child in psutil.Process(node.pid).children(recursive=True)]
        for process in [*started, *below]:
            process.kill()
        for node in started:
            node.wait()
        psutil.wait_procs(below, timeout=10)


def submitted(cluster: RayCluster, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return maestream("submit", "--address", cluster.address, *words, check=check, **cluster.environment)


@pytest.mark.timeout(900)  # starts Ray three times; metrics arrive every ten seconds
def test_a_stopped_job_resumes(
    cluster: RayCluster, scenes: Dataset, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped job writes a checkpoint and repeats no step when it is submitted again; its log is shown."""
    monkeypatch.chdir(tree)
    out = tmp_path / "run"
    words = (
        *JOB,
        "--data",
        scenes.store.url,
        "--out",
        out,
        "workers=2",
        f"data.cache={tmp_path}",
        "data.cache_gb=1",
    )
    output = submitted(cluster, "--name", "first", "--env", "GREETING=hello", "--", *words).stdout
    assert f"submitted job first to {cluster.address}" in output
    assert "already has a job of this name" in refused(
        "submit", "--address", cluster.address, "--name", "first", "--", *words, **cluster.environment
    )
    metrics: dict[str, float] = {}

    def has_all_metrics() -> bool:
        metrics.update(cluster.scraped())  # some may be missing in an answer of Ray's exporter
        return metrics.keys() == METRICS.keys() and metrics["step"] >= metrics["committed_step"] > 20

    wait_until(has_all_metrics)
    assert metrics["workers"] == 2
    assert metrics["images_per_second"] > 0
    assert 0 < metrics["data_wait_share"] < 1
    assert 0 < metrics["cache_hit_rate"] <= 1  # workers share the cache
    assert metrics["worker_changes"] == metrics["redone_steps"] == metrics["bad_samples"] == 0
    assert metrics["committed_age_seconds"] < 60
    cluster.ray("job", "stop", "first")
    log = cluster.ray("job", "logs", "first")
    assert "stopping: the workers save their state first" in log
    stopped = committed_steps(open_store(str(out)))[-1]
    assert f"stopped after step {stopped}, with a checkpoint" in log

    command = (
        "submit",
        "--address",
        cluster.address,
        "--wait",
        "--retry",
        "1",
        "--name",
        "second",
        "--",
        *words,
    )
    second = subprocess.Popen(
        [Path(sys.executable).with_name("maestream"), *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **cluster.environment},
    )  # fmt: skip
    wait_until(lambda: len(losses(out)) > stopped)
    cluster.ray("job", "stop", "second")
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 130, output
    assert f"attempt 2: 2 workers resume at step {stopped}" in output
    assert output.count("stopped after step") == 1
    assert "job second: stopped" in output
    (attempt,) = [event for event in read_events(open_store(str(out))) if event.get("attempt") == 2]
    assert attempt["step"] == stopped
    assert attempt.get("redone", 0) == 0
    assert "s3cr3t" not in log + output


def test_log_and_final_state_of_a_job_are_shown(
    cluster: RayCluster, scenes: Dataset, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    done = submitted(cluster, "--wait", "--", "shards", "show", scenes.store.url)
    assert "70" in done.stdout
    assert re.search(r"job raysubmit_\w+: succeeded", done.stdout)


def test_a_failed_job_gives_its_exit_code(
    cluster: RayCluster, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    done = submitted(
        cluster, "--wait", "--retry", "3", "--", *JOB, "--data", tmp_path / "none", "--out", tmp_path / "run",
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout.count("is not a dataset") == 1
    assert "failed" in done.stdout.splitlines()[-1]


def test_access_needs_a_token(cluster: RayCluster, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    words = ("submit", "--address", cluster.address, "--", *JOB, "--data", "s3://b/d", "--out", "s3://b/r")
    assert "requires a token" in refused(*words, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    assert "requires a token" in refused(*words, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 32)


def test_the_job_server_is_not_reachable_from_other_machines(cluster: RayCluster) -> None:
    port = int(cluster.address.rpartition(":")[2])
    listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_the_grafana_dashboard_shows_all_metrics() -> None:
    dashboard = json.loads((ROOT / "cluster/deploy/templates/grafana.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {re.search(r"ray_maestream_(\w+)\{", expression)[1] for expression in shown} == METRICS.keys()
