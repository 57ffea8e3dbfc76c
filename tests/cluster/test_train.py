"""Training on Ray: real workers, killed for real, locally and from a bucket."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import build_dataset, maestream, refused

from pipeline.manifest import Dataset
from pipeline.storage import open_store
from trainer.metrics import read_metrics

RECIPE = """
global_batch: 12
epochs: 40            # of 5 steps
log_every: 5
workers: 2
precision: float32
checkpoint: {every_steps: 35}
model: {image_size: 32, patch_size: 8, width: 24, depth: 2, heads: 3,
        decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
optim: {blr: 0.05, warmup_epochs: 1}
data: {lanes: 6, block: 8}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


def words(recipe: Path, data: str, out: object, *more: str) -> tuple[object, ...]:
    return ("pretrain", "--config", recipe, "--data", data, "--out", out, *more)


@pytest.fixture(scope="module")
def whole(recipe: Path, scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = maestream(*words(recipe, scenes.store.url, out))
    assert "step 200/200" in done.stdout
    return out


def losses(url: object) -> list[float]:
    return [row["loss"] for row in read_metrics(open_store(str(url)))]


def kill_at(step: int, command: tuple[object, ...], out: Path, victims: str) -> None:
    """Start a run; once its metrics reach `step`, SIGKILL its driver, a worker, or all of these."""
    program = Path(sys.executable).with_name("maestream")
    process = subprocess.Popen([program, *map(str, command)])
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            if (out / "metrics.jsonl").exists() and len(losses(out)) > step:
                break
            time.sleep(0.02)
        else:
            pytest.fail(f"no step {step} in two minutes")
    finally:
        workers = _workers_of(process.pid)
        chosen = {"driver": [process.pid], "worker": workers[:1], "all": [*workers, process.pid]}
        for pid in chosen[victims]:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(60) == (1 if victims == "worker" else -signal.SIGKILL)
    while any(Path(f"/proc/{worker}").exists() for worker in workers):  # they follow within seconds
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    recipe: Path, scenes: Dataset, whole: Path, tmp_path: Path
) -> None:
    command = words(recipe, scenes.store.url, tmp_path / "run")
    kill_at(57, command, tmp_path / "run", "all")  # in the middle of an epoch, and between two commits
    killed_at = len(losses(tmp_path / "run"))
    assert 57 < killed_at < 200
    done = maestream(*command)
    assert "attempt 2" in done.stdout
    rows = read_metrics(open_store(str(tmp_path / "run")))
    assert [row["step"] for row in rows] == list(range(200))
    assert rows[0]["attempt"] == 1
    assert rows[-1]["attempt"] == 2
    assert [row["loss"] for row in rows] == losses(whole)  # bit for bit


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", ["workers=1", "workers=2"])
def test_killed_again_and_again(recipe: Path, scenes: Dataset, tmp_path: Path, workers: str) -> None:
    """Ten kills at random steps, of the driver and of a worker in turn; the joined run is bit-equal."""
    rng = random.Random(0)
    longer = (workers, "epochs=600")  # workers that lost their driver train on for a second or two
    maestream(*words(recipe, scenes.store.url, tmp_path / "whole", *longer))
    command = words(recipe, scenes.store.url, tmp_path / "run", *longer)
    for kill in range(10):
        done = len(losses(tmp_path / "run")) if kill else 0
        kill_at(done + rng.randrange(1, 80), command, tmp_path / "run", ("driver", "worker", "all")[kill % 3])
    maestream(*command)
    rows = read_metrics(open_store(str(tmp_path / "run")))
    assert rows[-1]["attempt"] == 11
    assert [row["loss"] for row in rows] == losses(tmp_path / "whole")


def test_the_same_run_from_and_to_a_bucket(
    recipe: Path, scenes: Dataset, whole: Path, s3: str, tmp_path: Path
) -> None:
    remote = build_dataset("synthetic:?count=70&classes=7", f"{s3}/train-scenes")
    maestream(*words(recipe, remote.store.url, f"{s3}/runs/a"))
    assert losses(f"{s3}/runs/a") == losses(whole)
    store = open_store(f"{s3}/runs/a")
    names = store.names()
    assert "checkpoints/step-00000200/COMMITTED" in names
    assert "pictures/step-00000200.png" in names
    assert any(name.startswith("tensorboard/events") for name in names)
    # and the run can be looked at
    out = maestream(
        "reconstruct", store.url, "--data", remote.store.url, "--grid", f"{s3}/r.png", "--count", 8
    ).stdout
    assert "step 200: error over masked" in out
    assert open_store(s3).read("r.png").startswith(b"\x89PNG")


def test_what_only_a_person_can_mend_stops_all_ranks_with_exit_code_2(
    recipe: Path, scenes: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(scenes.store.root, tmp_path / "data")
    shard = sorted((tmp_path / "data").glob("*.tar"))[1]
    shard.unlink()
    command = words(recipe, str(tmp_path / "data"), tmp_path / "run")
    assert f"{shard.name} is missing" in refused(*command)
    shutil.copy(Path(scenes.store.root) / shard.name, shard)
    other = build_dataset("synthetic:?count=70&classes=7&seed=9", str(tmp_path / "other"))
    assert "another dataset" in refused(*words(recipe, other.store.url, tmp_path / "run"))


def _workers_of(driver: int) -> list[int]:
    """The processes of a driver's training workers."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    workers = []
    for pid in parents:
        above = pid
        while above in parents and above != driver:
            above = parents[above]
        if above == driver:
            with contextlib.suppress(OSError):
                if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    workers.append(pid)
    return workers


def test_nothing_is_left_running(whole: Path) -> None:
    """Embedded Rays end with their driver, also the one that was killed."""
    deadline = time.monotonic() + 30
    while (left := _raylets_of_this_test()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def _raylets_of_this_test() -> list[str]:
    """Command lines of Ray daemons that live in this environment's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if line.startswith(str(Path(sys.prefix))) and ("raylet" in line or "gcs_server" in line):
                found.append(line[:120])
    return found
