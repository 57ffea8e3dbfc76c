"""Builds write the same bytes at any number of tasks, also if processes are killed; no finished shard is written twice."""

import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.verify import verify
from pipeline.storage.store import open_store
from pipeline.text import plural
from tests.support.command_line import maestream, printed, refused
from tests.support.datasets import IMAGENET_SAMPLE, build_dataset
from tests.support.fault_proxy import SLOW_DOWN, fault_proxy
from tests.support.paths import ROOT
from tests.support.processes import processes
from tests.support.runs import kill, wait_until

pytestmark = pytest.mark.integration

SOURCE = "synthetic:?count=96&classes=6"


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of all files by path, without the contact sheet."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "contact-sheet.png"
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a build by a single process."""
    folder = tmp_path_factory.mktemp("whole")
    build_dataset(SOURCE, str(folder), 1 << 19)
    return tree(folder)


@pytest.mark.usefixtures("on_one_ray")
def test_any_number_of_tasks_writes_the_same_bytes(expected: dict[str, bytes], tmp_path: Path) -> None:
    for tasks in (1, 2, 5):
        out = tmp_path / str(tasks)
        said = printed("shards", "build", SOURCE, out, "--shard-mb", 0.5, "--tasks", tasks)
        assert "96 images in 10 shards" in said
        assert tree(out) == expected


class Build:
    """A running `maestream shards build`, some of whose processes are killed."""

    def __init__(self, out: Path, rng: random.Random, source: str = SOURCE, shard_mb: float = 0.5) -> None:
        self.out, self.rng, self.source, self.shard_mb = out, rng, source, shard_mb
        self.kills = 0
        self.written: dict[str, int] = {}  # shard → inode, which changes if the shard is written again

    def receipts(self) -> list[str]:
        return sorted(path.stem for path in (self.out / "building").glob("shard-*.json"))

    def check_kept(self) -> None:
        """Check that no finished shard was written again."""
        for name in self.receipts() or self.written:  # a finished build has removed its receipts
            number = (self.out / f"{name}.tar").stat().st_ino
            assert self.written.setdefault(name, number) == number, f"{name} was written twice"

    def run(self, *victims: str) -> str:
        """Run until the build ends or its driver is killed. Each kill comes one or two shards after the last."""
        words = ["shards", "build", self.source, self.out, "--shard-mb", self.shard_mb, "--tasks", 2]
        process = psutil.Popen(
            [str(ROOT / ".venv/bin/maestream"), *map(str, words)], stdout=-1, stderr=-1, text=True
        )
        for victim in victims:
            done = len(self.receipts()) + self.rng.randint(1, 2)
            wait_until(lambda done=done: len(self.receipts()) >= done or process.poll() is not None)
            time.sleep(self.rng.uniform(0, 0.3))
            if process.poll() is not None:
                break
            self.check_kept()
            if victim == "driver":
                left = processes("ray::write_shard", process.pid)  # Ray's own processes take a minute to end
                kill(process.pid)
                process.communicate()
                wait_until(lambda left=left: not any(map(psutil.pid_exists, left)))
                self.kills += 1
                return ""
            if tasks := processes("ray::write_shard", process.pid):
                kill(self.rng.choice(tasks))
                self.kills += 1
        said, errors = process.communicate(timeout=240)
        assert process.returncode == 0, said + errors
        self.check_kept()
        return str(said)


def test_a_killed_build_resumes_with_the_same_bytes(expected: dict[str, bytes], tmp_path: Path) -> None:
    build = Build(tmp_path / "out", random.Random(0))
    build.run("task", "driver")
    kept = len(build.receipts())
    said = build.run("task")
    assert f"{plural(kept, 'shard')} already existed" in said
    assert tree(tmp_path / "out") == expected


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_kills(tmp_path: Path) -> None:
    rng = random.Random(1)
    source = "synthetic:?count=400&classes=6"
    build_dataset(source, str(tmp_path / "whole"), 1 << 19)
    kills = 0
    while kills < 20:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        build = Build(tmp_path / "out", rng, source)
        for _ in range(3):
            build.run(*rng.choice([("driver",), ("task", "driver"), ("task", "task", "driver")]))
            if not (tmp_path / "out" / "building.json").exists():
                break  # the build finished
        else:
            build.run()
        assert tree(tmp_path / "out") == tree(tmp_path / "whole")
        kills += build.kills


def test_build_to_a_faulty_bucket(expected: dict[str, bytes], s3: str) -> None:
    url = f"{s3}/shards-through-faults"
    with fault_proxy(urlsplit(os.environ["AWS_ENDPOINT_URL"]).port or 0) as proxy:
        through = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        proxy.share, proxy.faults = 0.2, ("reset", "short", SLOW_DOWN)
        maestream("shards", "build", SOURCE, url, "--shard-mb", 0.5, **through)
        assert proxy.injected > 10
    store = open_store(url)
    names = [name for name in store.names() if name != "contact-sheet.png"]
    assert {name: store.read(name) for name in names} == expected


@pytest.mark.usefixtures("on_one_ray")
@pytest.mark.parametrize(
    ("options", "message"), [("size=3m", "no space left"), ("size=3m,ro", "Read-only file system")]
)
def test_a_full_or_read_only_destination_is_one_line(options: str, message: str, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", small], check=False).returncode:
        pytest.skip("may not mount here")
    try:
        said = refused("shards", "build", SOURCE, small / "out", "--shard-mb", 0.5, process=True)
        assert message in said
        assert str(small) in said
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.usefixtures("on_one_ray")
def test_build_of_the_imagenet_sample_with_changed_images(tmp_path: Path) -> None:
    if not IMAGENET_SAMPLE:
        pytest.skip("MAESTREAM_IMAGENET_SAMPLE is not set")
    out = tmp_path / "out"
    said = printed("shards", "build", IMAGENET_SAMPLE, out, "--longer-side", 256, "--rgb-jpeg")
    assert "750 of ImageNet's 1000 classes missing" in said
    dataset = open_dataset(str(out))
    assert verify(dataset) == []
    assert dataset.manifest.built["changed"] > 200
    assert "longer side at most 256 pixels" in dataset.manifest.built["bytes"]
    index = dataset.read_index_table(0)
    assert max(index["width"].to_pylist() + index["height"].to_pylist()) == 256
    assert json.loads((out / "manifest.json").read_text())["samples"] == 250
