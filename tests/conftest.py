"""What tests share: small real datasets, a real S3 server, and the command line as a user runs it."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from pipeline.manifest import Dataset, open_dataset
from pipeline.storage import open_store

# Models here are so small that threads which wait for each other take ten times as long, where other processes run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Shells start what is in the background with SIGINT ignored, and so all that it starts: a test that interrupts would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
ROOT = Path(__file__).parents[1]
IMAGENET_SAMPLE = ROOT.parent / "shared/data/imagenet_sample"


@pytest.fixture(scope="session", autouse=True)
def ray_folder() -> Iterator[None]:
    """Rays of these tests are known by where they keep their things. A short path: sockets lie there (107 bytes, unix(7))."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        yield


def build_dataset(
    source: str, dest: str, shard_bytes: int = 1 << 20, seed: int = 0, overwrite: bool = False
) -> Dataset:
    from pipeline.shards import build  # with webdataset, which a machine for tests/gpu need not have
    from pipeline.write import Options

    build(source, open_store(dest), Options(shard_bytes=shard_bytes, seed=seed), overwrite=overwrite)
    return open_dataset(dest)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """70 drawn scenes in several shards."""
    return build_dataset("synthetic:?count=70&classes=7", str(tmp_path_factory.mktemp("data") / "scenes"))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """250 real photographs; skips where they are absent."""
    if not IMAGENET_SAMPLE.is_dir():
        pytest.skip("no ImageNet sample beside the project")
    return build_dataset(str(IMAGENET_SAMPLE), str(tmp_path_factory.mktemp("data") / "photographs"), 4 << 20)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """s3://bucket of a real S3 server, with its AWS variables in the environment."""
    python = ROOT / ".venv-s3/bin/python"
    assert python.exists(), "run `make s3` first"
    folder = tmp_path_factory.mktemp("s3")
    server = subprocess.Popen(
        [python, ROOT / "tests/s3_server.py", "--dir", folder], stdout=subprocess.PIPE, text=True
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
    from processes import processes, wait_until  # with psutil, likewise

    monkeypatch.setenv("RAY_ADDRESS", one_ray)
    yield
    for actor in ("RayTrainWorker", "TrainController", "Mailbox"):
        wait_until(lambda name=f"ray::{actor}": not processes(name, os.getpid()), 30)


def maestream(*words: object, check: bool = True, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line as a user does."""
    command = [str(Path(sys.executable).with_name("maestream")), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=240, check=False
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def printed(*words: object) -> str:
    """What a command prints that succeeds, run in this process: it saves the seconds that imports take."""
    code, out, err = _in_this_process(words)
    assert code == 0, out + err
    return out


def refused(*words: object, process: bool = False, **environment: str) -> str:
    """The one message of a command that is refused: exit code 2, no traceback. In a process of its own if that is wanted,
    or needed; without, it saves the seconds that imports take."""
    if process or environment:
        done = maestream(*words, check=False, **environment)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = _in_this_process(words)
    assert code == 2, out + err
    assert "Traceback" not in out + err
    assert len(err.strip().splitlines()) == 1, err
    return err.strip()


def _in_this_process(words: tuple[object, ...]) -> tuple[object, str, str]:
    from cluster.cli import main

    out, err, arguments = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["maestream", *map(str, words)]
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = arguments
    return code, out.getvalue(), err.getvalue()
