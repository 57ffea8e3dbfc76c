"""What tests share: small real datasets, a real S3 server, and the command line as a user runs it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.manifest import Dataset, open_dataset
from pipeline.storage import open_store

ROOT = Path(__file__).parents[1]
IMAGENET_SAMPLE = ROOT.parent / "shared/data/imagenet_sample"


def build_dataset(source: str, dest: str, shard_bytes: int = 1 << 20, **options: object) -> Dataset:
    from pipeline.shards import build  # with webdataset, which a machine for tests/gpu need not have
    from pipeline.sources import open_source

    build(open_source(source), open_store(dest), shard_bytes=shard_bytes, **options)  # type: ignore[arg-type]
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


def maestream(*words: object, check: bool = True, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line as a user does."""
    command = [str(Path(sys.executable).with_name("maestream")), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=240, check=False
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(*words: object, **environment: str) -> str:
    """The one message of a command that is refused: exit code 2, no traceback."""
    done = maestream(*words, check=False, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr.strip()
