"""Storage faults never change a batch. A permanent outage stops a run at the deadline with its reason, and the run can be
resumed."""

import contextlib
import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from s3fs import S3FileSystem

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import index_name
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.loading.fetch_client import Fetcher, Range
from pipeline.loading.loader import Loader, TrainBatch
from pipeline.loading.order import Order
from pipeline.storage import store as storage
from pipeline.storage.store import open_store
from tests.support.datasets import build_dataset
from tests.support.fault_proxy import SLOW_DOWN, Fault, FaultProxy, answer, fault_proxy, s3_error
from tests.support.processes import processes

pytestmark = pytest.mark.integration

STALL_S = 1.0  # shorter than the default, so that the tests are fast
PART = 1 << 14
STEPS = 7  # more than an epoch
PAGE = b"<html><h1>Too busy<hr>no closing tag</html>"
REFUSALS: list[Fault] = [
    s3_error("503 Service Unavailable", "ServiceUnavailable"),
    s3_error("500 Internal Server Error", "InternalError"),
    s3_error("429 Too Many Requests", "TooManyRequests"),
    s3_error("400 Bad Request", "RequestTimeout"),
    answer("502 Bad Gateway", PAGE),
    answer("429 Too Many Requests", PAGE),
    b"\x15\x03\x01\x00\x02\x02\x50no HTTP",
    b"",
]
FAULTS: dict[str, tuple[float, list[Fault]]] = {  # name → share of requests with a fault, kinds of fault
    "503": (0.5, [SLOW_DOWN]),
    "other refusals": (0.4, REFUSALS),
    "reset": (0.3, ["reset"]),
    "short body": (0.3, ["short"]),
    "stall": (0.3, ["stall"]),
}


def make_loader(dataset: Dataset, cache: tuple[str, int] | None = None) -> Loader:
    order = Order(dataset.shard_samples, seed=0, global_batch=12, lanes=6, block=2)  # many small requests
    return Loader(dataset, order, make_decoder("cpu", 32, 2), 0, 1, cache)


def run(dataset: Dataset, cache: tuple[str, int] | None = None, start: int = 0) -> Iterator[TrainBatch]:
    """The batches of steps `start` to STEPS."""
    with contextlib.closing(make_loader(dataset, cache)) as loader:
        yield from loader.steps(start, STEPS)


def assert_same(batch: TrainBatch, expected: TrainBatch) -> None:
    assert batch.step == expected.step
    for name in ("images", "sample_ids", "weights", "labels"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), (batch.step, name)


@pytest.fixture(scope="module")
def expected(scenes: Dataset) -> list[TrainBatch]:
    """The batches without faults."""
    return list(run(scenes))


@pytest.fixture(scope="module")
def url(s3: str) -> str:
    """The URL of the same dataset in a bucket."""
    return build_dataset("synthetic:?count=70&classes=7", f"{s3}/faults").store.url


@pytest.fixture
def proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The proxy between the S3 server and the clients of this process and its fetchers."""
    upstream = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert upstream
    with fault_proxy(upstream) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setattr(storage, "STALL_S", STALL_S)
        S3FileSystem.clear_instance_cache()  # cached clients would keep the old address
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_many_requests_change_no_batch(
    proxy: FaultProxy, url: str, expected: list[TrainBatch], name: str
) -> None:
    proxy.share, proxy.faults = FAULTS[name]
    for batch in run(open_dataset(url)):
        assert_same(batch, expected[batch.step])
    assert proxy.injected > 1


def test_latency_changes_no_batch(proxy: FaultProxy, url: str, expected: list[TrainBatch]) -> None:
    proxy.latency_s = 0.2
    for batch in run(open_dataset(url)):
        assert_same(batch, expected[batch.step])


def refuse_for(proxy: FaultProxy, seconds: float) -> threading.Timer:
    proxy.refuse()
    timer = threading.Timer(seconds, proxy.accept)
    timer.start()
    return timer


def test_refused_connections_are_retried(proxy: FaultProxy, url: str, expected: list[TrainBatch]) -> None:
    for batch in run(open_dataset(url)):
        assert_same(batch, expected[batch.step])
        if batch.step == 0:
            refusal = refuse_for(proxy, 2)
    refusal.join()


def all_mixed(
    proxy: FaultProxy, url: str, expected: list[TrainBatch], folder: Path, epochs: int, down_s: float
) -> None:
    """All faults at once, with a disk cache of half the dataset, which must not store wrong bytes."""
    proxy.share, proxy.latency_s = 0.25, 0.2
    proxy.faults = [SLOW_DOWN, *REFUSALS, "reset", "short", "stall"]
    dataset = open_dataset(url)
    for epoch in range(epochs):
        for batch in run(dataset, (str(folder), int(dataset.shard_bytes.sum()) // 2)):
            assert_same(batch, expected[batch.step])
            if batch.step == 1 and epoch % 2 == 0:
                refusal = refuse_for(proxy, down_s)
        refusal.join()


def test_all_faults_mixed_with_a_disk_cache(
    proxy: FaultProxy, url: str, expected: list[TrainBatch], tmp_path: Path
) -> None:
    all_mixed(proxy, url, expected, tmp_path, epochs=2, down_s=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_all_faults_mixed_for_long(
    proxy: FaultProxy, url: str, expected: list[TrainBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "STALL_S", 10)  # the default
    all_mixed(proxy, url, expected, tmp_path, epochs=10, down_s=10)


def test_a_server_that_ignores_ranges_is_detected(
    proxy: FaultProxy, url: str, expected: list[TrainBatch], scenes: Dataset
) -> None:
    def whole(request: str) -> bytes:
        return answer(
            "200 OK", Path(scenes.store.root, request.split()[1].rpartition("faults/")[2]).read_bytes()
        )

    dataset = open_dataset(url)
    proxy.share, proxy.faults = 0.4, [whole]
    for batch in run(dataset):
        assert_same(batch, expected[batch.step])


@pytest.fixture(scope="module")
def large(s3: str) -> dict[str, bytes]:
    """Objects with sizes around multiples of PART bytes."""
    rng = random.Random(0)
    sizes = (0, 1, PART - 1, PART, PART + 1, 9 * PART, 9 * PART + 5)
    objects = {str(size): rng.randbytes(size) for size in sizes}
    store = open_store(f"{s3}/large")
    for name, data in objects.items():
        store.write(name, data)
    return objects


def test_large_objects_are_read_completely(
    proxy: FaultProxy, s3: str, large: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", PART)

    def whole(request: str) -> bytes:
        return answer("200 OK", large[request.split()[1].rpartition("/")[2]])

    store = open_store(f"{s3}/large")
    proxy.share, proxy.faults = 0.4, [SLOW_DOWN, "reset", "short", whole]
    for name, data in large.items():
        assert store.read(name) == data


def test_large_objects_appear_only_when_complete(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object uploaded in parts is not visible before the last one."""
    monkeypatch.setattr(
        storage, "STALL_S", 10
    )  # the default: no fault here is a stall, but the machine may be slow
    store = open_store(f"{s3}/large-written")
    data = random.Random(0).randbytes(5 * storage.PART_BYTES + 7)
    store.write("object", data[: storage.PART_BYTES])
    done = threading.Event()
    seen = set()

    def watch() -> None:
        direct = s3fs_past(proxy)
        while not done.wait(0.01):
            seen.add(direct.size(store.path("object")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    proxy.share, proxy.faults = 0.4, [SLOW_DOWN, "reset", "short"]
    try:
        store.write("object", data)
    finally:
        done.set()
        watcher.join()
    proxy.stop_faults()
    assert proxy.injected
    assert store.sha256("object") == hashlib.sha256(data).hexdigest()
    assert seen <= {storage.PART_BYTES, len(data)}
    parts = [line for line in proxy.requests if "partNumber=" in line]
    assert 6 < len(parts) < 60  # single parts were retried


def test_a_failed_upload_is_retried(proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if aborting it fails with NoSuchUpload, as it does if the response to a first abort was lost."""
    monkeypatch.setattr(storage, "STALL_S", 10)
    store, aborted = open_store(f"{s3}/given-up"), threading.Event()

    def give_up(request: str) -> bytes | None:
        if request.startswith("DELETE") and "uploadId=" in request:
            aborted.set()
            return s3_error("404 Not Found", "NoSuchUpload")
        return SLOW_DOWN if "partNumber=" in request and not aborted.is_set() else None

    data = random.Random(0).randbytes(2 * storage.PART_BYTES + 7)  # s3fs sends smaller objects in one request
    proxy.share, proxy.faults = 1.0, [give_up]
    store.write("object", data)
    assert aborted.is_set()
    proxy.stop_faults()
    assert store.sha256("object") == hashlib.sha256(data).hexdigest()


def s3fs_past(proxy: FaultProxy) -> S3FileSystem:
    """A client that bypasses the proxy."""
    return S3FileSystem(endpoint_url=f"http://127.0.0.1:{proxy.upstream}", skip_instance_cache=True)


def outage(proxy: FaultProxy, how: Fault | None) -> None:
    if how is None:
        proxy.refuse()
    else:
        proxy.share, proxy.faults = 1.0, [how]


@pytest.mark.parametrize(
    ("how", "reason"), [(None, "Could not connect"), ("stall", "[Tt]ime"), (SLOW_DOWN, "SlowDown|reduce")]
)
def test_an_outage_stops_a_run_at_the_deadline_and_it_can_be_resumed(
    proxy: FaultProxy,
    url: str,
    expected: list[TrainBatch],
    monkeypatch: pytest.MonkeyPatch,
    how: Fault | None,
    reason: str,
) -> None:
    monkeypatch.setattr(storage, "DEADLINE_S", 4)
    dataset = open_dataset(url)
    loader = make_loader(dataset)
    loader.lane_bytes = 1 << 16  # read little ahead, so that the outage has an effect
    reached, begin = 0, 0.0
    with pytest.raises(UserError, match=reason) as stopped:  # noqa: PT012
        for batch in loader.steps(0, STEPS):
            assert_same(batch, expected[batch.step])
            reached = batch.step + 1
            if reached == 2:
                outage(proxy, how)
                begin = time.monotonic()
    assert 2 <= reached < STEPS
    assert time.monotonic() - begin < 4 + 2
    assert url in str(stopped.value)
    assert processes("pipeline.loading.fetch_process", os.getpid()) == []
    proxy.stop_faults()
    proxy.accept()
    for batch in loader.steps(reached, STEPS):
        assert_same(batch, expected[batch.step])
        reached += 1
    assert reached == STEPS
    loader.close()


def test_a_slow_response_does_not_outlast_the_deadline(
    proxy: FaultProxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "DEADLINE_S", 2)
    dataset = open_dataset(url)
    proxy.share, proxy.faults = 1.0, ["trickle"]
    begin = time.monotonic()
    with pytest.raises(UserError, match="timed out before the whole response arrived"):
        dataset.shard_store.read_range(dataset.shard_name(0), 0, 100_000)
    assert time.monotonic() - begin < 2 + 1


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [("403 Forbidden", "AccessDenied", "access denied"), ("404 Not Found", "NoSuchKey", "is missing")],
)
def test_errors_that_need_user_action_are_not_retried(
    proxy: FaultProxy, url: str, status: str, code: str, message: str
) -> None:
    dataset = open_dataset(url)
    fetcher = Fetcher(dataset.shard_store.url, dataset.store.url)
    proxy.share, proxy.faults = 1.0, [s3_error(status, code)]
    before = len(proxy.requests)
    for begin in (
        lambda: fetcher.read_file(index_name(dataset.shard_name(0))),
        lambda: fetcher.read_ranges([Range(dataset.shard_name(0), 0, 10, 0, 0, 0)], fill_cache=False),
    ):
        with pytest.raises(UserError, match=message):
            begin().result(20)
    assert len(proxy.requests) - before == 2
    fetcher.close()
