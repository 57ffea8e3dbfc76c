"""A preemption notice makes Ray drain the node: a fake metadata service of both clouds, and a real cluster."""

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated.common_pb2 import NodeDeathInfo

from cluster.elastic import preemption

pytestmark = pytest.mark.integration

NONE_YET = (404, "")


class Service(ThreadingHTTPServer):
    """A fake metadata service (169.254.169.254) that follows the rules of both clouds."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers: list[tuple[int, str]] = [NONE_YET]  # in order; the last one is repeated
        self.asked = 0

    def handle_error(self, *_: object) -> None:
        """Print nothing when a client disconnects."""


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(*((200, "secret") if known else (400, "")))

    def do_GET(self) -> None:
        rules = {
            "/latest/meta-data/spot/instance-action": ("X-aws-ec2-metadata-token", "secret", 401),
            "/computeMetadata/v1/instance/preempted": ("Metadata-Flavor", "Google", 403),
        }
        header, value, refusal = rules[self.path]
        if self.headers[header] != value:
            self.answer(refusal, "")
            return
        self.server.asked += 1
        answers = self.server.answers
        self.answer(*(answers.pop(0) if len(answers) > 1 else answers[0]))

    def answer(self, status: int, text: str) -> None:
        if text == "slow":
            time.sleep(1)
        if text == "hangs up":
            return
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode("latin-1"))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there: the proxy must be ignored
    with Service() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        monkeypatch.setattr(preemption, "METADATA", server.url)
        monkeypatch.setattr(preemption, "TIMEOUT_S", 0.3)
        monkeypatch.setattr(preemption, "POLL_S", 0.02)
        yield server
        server.shutdown()


def firmware(folder: Path, vendor: str, version: str = "1.0") -> Path:
    (folder / "sys_vendor").write_text(vendor + "\n")
    (folder / "bios_version").write_text(version + "\n")
    return folder


def spot_action(seconds: float, action: str = "terminate") -> tuple[int, str]:
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    return 200, json.dumps({"action": action, "time": when.isoformat().replace("+00:00", "Z")})


def wait_until(true: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("vendor", "version", "cloud"),
    [
        ("Amazon EC2", "1.0", "Amazon EC2"),
        ("Xen", "4.11.amazon", "Amazon EC2"),
        ("Google", "Google", "Google"),
        ("QEMU", "1.16.3", None),
        ("Xen", "4.17", None),
    ],
)
def test_which_cloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, version: str, cloud: str | None
) -> None:
    monkeypatch.setattr(preemption, "FIRMWARE", firmware(tmp_path, vendor, version))
    assert preemption.detect_cloud() == cloud


def test_elsewhere_nobody_is_asked(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "FIRMWARE", tmp_path / "none")
    assert preemption.watch("ab" * 28, pytest.fail) is None
    assert service.asked == 0


def test_ec2(service: Service) -> None:
    assert preemption.ec2_notice() is None
    service.answers = [spot_action(60, "stop")]
    found = preemption.ec2_notice()
    assert found is not None
    assert found.action == "stop"
    assert found.seconds == pytest.approx(60, abs=2)


def test_gce(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "POLL_S", 5.0)
    service.answers = [(200, "FALSE"), (200, "TRUE\n")]
    assert preemption.gce_notice() is None
    assert preemption.gce_notice() == ("preempt", 25)


@pytest.mark.parametrize("when", [-30.0, 0.0, 3600.0, "soon", "", None])
def test_a_notice_with_an_invalid_time_counts(
    service: Service, monkeypatch: pytest.MonkeyPatch, when: float | str | None
) -> None:
    monkeypatch.setattr(preemption, "POLL_S", 5.0)
    service.answers = [
        spot_action(when) if isinstance(when, float) else (200, json.dumps({"action": "stop", "time": when}))
    ]
    found = preemption.ec2_notice()
    assert found is not None
    assert found.seconds == 115


@pytest.mark.parametrize(
    ("vendor", "answers", "sentence"),
    [
        ("Amazon EC2", [(401, ""), (200, "[1]"), None], r"Amazon EC2 will terminate node abababab in (60|5\d) s"),
        ("Google", [(404, ""), (200, "MAYBE"), (200, "TRUE")], r"Google will preempt node abababab in 30 s"),
    ],
)  # fmt: skip
def test_notice_is_reported_once_despite_errors_of_the_service(
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    vendor: str,
    answers: list[tuple[int, str] | None],
    sentence: str,
) -> None:
    notices, drained = [], []

    def drain(node_id: str, reason: str, seconds: float) -> bool:
        drained.append(node_id)
        if len(drained) == 1:
            raise ray.exceptions.RpcError("the head is busy")
        return True

    monkeypatch.setattr(preemption, "drain", drain)
    monkeypatch.setattr(preemption, "FIRMWARE", firmware(tmp_path, vendor))
    service.answers = [(500, "oops"), (200, "slow"), (200, "hangs up"), (503, ""), (200, "\xff{")]
    service.answers += [answer or spot_action(60) for answer in answers]
    with caplog.at_level(logging.WARNING):
        thread = preemption.watch("ab" * 28, notices.append)
        assert thread is not None
        assert thread.daemon
        thread.join(10)
    assert not thread.is_alive()
    (message,) = notices
    assert re.fullmatch(sentence, message)
    assert drained == ["ab" * 28] * 2  # the first call failed
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"node abababab cannot get preemption notices from {vendor}: ")


class Worker:
    """A process on a node, which watches for the node's notice."""

    def __init__(self, url: str, folder: Path) -> None:
        preemption.METADATA, preemption.FIRMWARE, preemption.POLL_S = url, folder, 0.1
        self.notices: list[str] = []

    def watch(self) -> str:
        node_id = ray.get_runtime_context().get_node_id()
        self.thread = preemption.watch(node_id, self.notices.append)
        return node_id

    def ended(self) -> list[str]:
        """Wait until the thread has ended, and return the notices."""
        assert self.thread is not None
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.notices


def node_of(node_id: str) -> dict[str, Any]:
    return next(node for node in ray.nodes() if node["NodeID"] == node_id)


def test_ray_drains_the_node_and_calls_its_end_a_preemption(service: Service, tmp_path: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, **small)
        for _ in range(2):
            cluster.add_node(num_cpus=1, **small)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        worker = ray.remote(num_cpus=1)(Worker).remote(service.url, firmware(tmp_path, "Amazon EC2"))
        node_id = ray.get(worker.watch.remote(), timeout=30)
        wait_until(lambda: service.asked > 3)
        assert ray._private.state.state.get_draining_nodes() == {}
        end = time.time() + 60
        service.answers = [spot_action(60)]
        wait_until(ray._private.state.state.get_draining_nodes)
        draining = ray._private.state.state.get_draining_nodes()
        assert draining == {node_id: pytest.approx(end * 1000, abs=500)}
        (sentence,) = ray.get(worker.ended.remote(), timeout=10)
        assert sentence.startswith(f"Amazon EC2 will terminate node {node_id[:8]} in ")
        ray.get(worker.watch.remote(), timeout=10)  # as a worker that is started on the draining node
        assert ray.get(worker.ended.remote(), timeout=10) == [sentence]
        assert ray._private.state.state.get_draining_nodes() == draining
        ray.kill(worker)  # Ray removes the draining node once it is idle
        wait_until(lambda: not node_of(node_id)["Alive"])
        assert node_of(node_id)["DeathReason"] == NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
        assert node_of(node_id)["DeathReasonMessage"] == sentence
    finally:
        ray.shutdown()
        cluster.shutdown()
