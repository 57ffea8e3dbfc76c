"""What tests share: small real datasets, a real S3 server, and the command line as a user runs it."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

from pipeline.dataset.dataset import Dataset
from tests.support.datasets import IMAGENET_SAMPLE, build_dataset
from tests.support.paths import ROOT

# Models here are so small that threads which wait for each other take ten times as long, where other processes run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Shells start what is in the background with SIGINT ignored, and so all that it starts: a test that interrupts would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def ray_folder() -> Iterator[None]:
    """Rays of these tests are known by where they keep their things. A short path: sockets lie there (107 bytes, unix(7))."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """70 drawn scenes in several shards."""
    return build_dataset("synthetic:?count=70&classes=7", str(tmp_path_factory.mktemp("data") / "scenes"))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """250 real photographs; skips where they are absent."""
    if not IMAGENET_SAMPLE:
        pytest.skip("MAESTREAM_IMAGENET_SAMPLE is not set")
    return build_dataset(IMAGENET_SAMPLE, str(tmp_path_factory.mktemp("data") / "photographs"), 4 << 20)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """s3://bucket of a real S3 server, with its AWS variables in the environment."""
    python = ROOT / ".venv-s3/bin/python"
    assert python.exists(), "run `make s3` first"
    folder = tmp_path_factory.mktemp("s3")
    server = subprocess.Popen(
        [python, ROOT / "tests/support/s3_server.py", "--dir", folder], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    before = dict(os.environ)
    try:
        for line in server.stdout:  # it ends by itself if it does not come up
            words = line.split()
            if words == ["ready"]:
                break
            if words[0] == "export":
                name, _, value = words[1].partition("=")
                os.environ[name] = value.strip("'")
            else:
                for name in words[1:]:
                    os.environ.pop(name, None)
        else:
            pytest.fail(f"the S3 server ended with {server.wait(5)}")
        yield "s3://maestream"
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.send_signal(signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="session")
def one_ray(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of one Ray on this machine, for tests that are not about how Ray begins and ends: that is most of what a short
    run costs. Its workers have the variables of `s3`. It ends with this process, even with one that is killed."""
    from ray.cluster_utils import Cluster

    with (
        tempfile.TemporaryDirectory(prefix="one-ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)  # not that of the Rays of single tests
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=4, object_store_memory=128 * 2**20, include_dashboard=False)
            patch.undo()
            yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture
def on_one_ray(one_ray: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands go to `one_ray`, and leave nothing there that works."""
    from tests.support.processes import processes, wait_until  # with psutil, likewise

    monkeypatch.setenv("RAY_ADDRESS", one_ray)
    yield
    for actor in ("RayTrainWorker", "TrainController", "Mailbox"):
        wait_until(lambda name=f"ray::{actor}": not processes(name, os.getpid()), 30)
