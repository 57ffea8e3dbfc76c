"""Training on Ray: real workers, killed for real, locally and from a bucket."""

import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import psutil
import pytest

from cluster.elastic.mailbox import MAX_FAILURES
from pipeline.dataset.dataset import Dataset
from pipeline.storage.store import open_store
from tests.support.command_line import maestream, printed, refused
from tests.support.datasets import build_dataset
from tests.support.processes import command_line
from tests.support.runs import kill, kill_a_worker, losses, running, wait_for_step, wait_until, workers_of
from tests.support.training.reference_run import train_reference_run
from trainer.run.events import read_events
from trainer.run.metrics import read_metrics
from trainer.run.run import read_starts

pytestmark = pytest.mark.integration

RECIPE = """
global_batch: 12
epochs: 40            # of 5 steps
log_every: 5
workers: 2
precision: float32
micro_batch: 1        # for steps of some 30 ms: snapshots are as far apart as they cost time
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
def reference(recipe: Path, scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two workers without Ray."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_reference_run("pretrain", recipe, (), scenes.store.url, out)
    return out


def test_kills_change_nothing(
    recipe: Path, scenes: Dataset, reference: Path, one_ray: str, tmp_path: Path
) -> None:
    """A worker is killed and replaced, then the driver is with all workers; the run is resumed on another cluster."""
    out = tmp_path / "run"
    store, command = open_store(str(out)), words(recipe, scenes.store.url, out)
    with running(command) as process:
        wait_for_step(57, process, out)  # in the middle of an epoch, and between two commits
        assert f"is owned by process {process.pid}" in refused(*command)
        survivor = workers_of()[1]
        kill_a_worker()
        wait_until(lambda: len(read_events(store)) == 3)
        assert survivor in workers_of()
        wait_for_step(len(losses(out)) + 5, process, out)
        kill(*workers_of(), process.pid)
        output, _ = process.communicate(timeout=180)
    first, failure, second = read_events(store)
    assert (first["attempt"], first["step"], first["world_size"]) == (1, 0, 2)
    assert re.fullmatch(r"worker [01] died", failure["cause"])
    assert (second["attempt"], second["world_size"], second["redone"]) == (2, 2, 0)
    assert f"{failure['cause']}: the other workers go on" in output
    assert f"attempt 2: 2 workers resume at step {second['step']}; 0 steps repeated" in output

    done = maestream(*command, RAY_ADDRESS=one_ray)
    assert "attempt 3" in done.stdout
    rows = read_metrics(store)
    assert [row["step"] for row in rows] == list(range(200))
    assert (rows[0]["attempt"], rows[-1]["attempt"]) == (1, 3)
    assert [row["loss"] for row in rows] == losses(reference)  # bit for bit
    assert not Path("/dev/shm", f"maestream-{json.loads((out / 'run.json').read_text())['run_id']}").exists()


@pytest.mark.soak
def test_failures_without_progress_stop_the_run_with_their_cause(
    recipe: Path, scenes: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with running(words(recipe, scenes.store.url, out, "checkpoint={}")) as process:
        for attempt in range(1, MAX_FAILURES + 1):
            wait_until(
                lambda n=attempt: (out / "run.json").exists() and len(read_starts(open_store(str(out)))) == n
            )
            kill(*workers_of())  # one that is left would go on where it is
        printed, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert printed.count("died: restarting the workers") == MAX_FAILURES - 1
    assert "died: giving up, because the run makes no progress" in printed
    assert "Traceback" not in printed


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", ["workers=1", "workers=2"])
def test_killed_again_and_again(recipe: Path, scenes: Dataset, tmp_path: Path, workers: str) -> None:
    """Ten kills at random steps, of a worker, of the driver, and of all; the losses equal those of an uninterrupted run."""
    rng, out = random.Random(0), tmp_path / "run"
    longer = (workers, "epochs=600")  # workers train on for a second or two after their driver died
    maestream(*words(recipe, scenes.store.url, tmp_path / "whole", *longer))
    command = words(recipe, scenes.store.url, out, *longer)
    for round_ in range(5):
        with running(command) as process:
            done = len(losses(out)) if round_ else 0
            wait_for_step(done + rng.randrange(1, 80), process, out)
            kill_a_worker()
            wait_for_step(len(losses(out)) + rng.randrange(1, 80), process, out)
            kill(*(workers_of() if round_ % 2 else []), process.pid)
    maestream(*command)
    rows = read_metrics(open_store(str(out)))
    assert rows[-1]["attempt"] == 11
    assert [row["loss"] for row in rows] == losses(tmp_path / "whole")


@pytest.mark.usefixtures("on_one_ray")
def test_the_same_run_from_and_to_a_bucket(recipe: Path, scenes: Dataset, s3: str, tmp_path: Path) -> None:
    train_reference_run("pretrain", recipe, ("epochs=8",), scenes.store.url, tmp_path / "local")
    remote = build_dataset("synthetic:?count=70&classes=7", f"{s3}/train-scenes")
    maestream(*words(recipe, remote.store.url, f"{s3}/runs/a", "epochs=8"))
    assert losses(f"{s3}/runs/a") == losses(tmp_path / "local")
    store = open_store(f"{s3}/runs/a")
    names = store.names()
    assert "checkpoints/step-00000040/COMMITTED" in names
    assert "pictures/step-00000040.png" in names
    assert any(name.startswith("tensorboard/events") for name in names)
    # and other commands can read the run
    out = printed("reconstruct", store.url, "--data", remote.store.url, "--grid", f"{s3}/r.png", "--count", 8)
    assert "step 40: error over masked" in out
    assert open_store(s3).read("r.png").startswith(b"\x89PNG")


@pytest.mark.usefixtures("on_one_ray")
def test_user_errors_stop_all_ranks_with_exit_code_2(recipe: Path, scenes: Dataset, tmp_path: Path) -> None:
    shutil.copytree(scenes.store.root, tmp_path / "data")
    shard = sorted((tmp_path / "data").glob("*.tar"))[1]
    shard.unlink()
    command = words(recipe, str(tmp_path / "data"), tmp_path / "run", "epochs=4")
    message = refused(*command, process=True)
    assert f"{shard.name} is missing" in message
    assert json.loads((tmp_path / "run" / "failed.json").read_text())["reason"] in message
    assert read_starts(open_store(str(tmp_path / "run"))) == [0]  # no retry
    shutil.copy(Path(scenes.store.root) / shard.name, shard)
    other = build_dataset("synthetic:?count=70&classes=7&seed=9", str(tmp_path / "other"))
    assert "another dataset" in refused(*words(recipe, other.store.url, tmp_path / "run", "epochs=4"))
    assert f"the previous attempt failed: {shard}" in maestream(*command).stdout
    assert not (tmp_path / "run" / "failed.json").exists()


def test_no_ray_process_is_left() -> None:
    """A Ray that a driver has started ends with it, even if the driver was killed."""
    deadline = time.monotonic() + 30
    while (remaining := _raylets_of_this_test()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert remaining == []


def _raylets_of_this_test() -> list[str]:
    """Return the command lines of Ray daemons that these tests have started."""
    lines = [command_line(process) for process in psutil.process_iter() if process.pid != os.getpid()]
    ours = [line for line in lines if os.environ["RAY_TMPDIR"] in line]
    return [line[:120] for line in ours if "raylet" in line or "gcs_server" in line]
