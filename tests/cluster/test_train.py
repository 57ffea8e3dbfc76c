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
from conftest import build_dataset, maestream, printed, refused
from processes import command_line
from run_control import kill, losses, running, wait_for_step, wait_until, workers_of
from undisturbed import train_undisturbed

from cluster.failures import HOPELESS
from pipeline.manifest import Dataset
from pipeline.storage import open_store
from trainer.events import read_events
from trainer.metrics import read_metrics
from trainer.run import read_starts

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
def whole(recipe: Path, scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers that nothing disturbed, not even Ray."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_undisturbed("pretrain", recipe, (), scenes.store.url, out)
    return out


def test_kills_change_nothing(
    recipe: Path, scenes: Dataset, whole: Path, one_ray: str, tmp_path: Path
) -> None:
    """A worker first, then the driver and all of its workers; it goes on elsewhere, on a cluster."""
    out = tmp_path / "run"
    store, command = open_store(str(out)), words(recipe, scenes.store.url, out)
    with running(command) as process:
        wait_for_step(57, process, out)  # in the middle of an epoch, and between two commits
        assert f"is owned by process {process.pid}" in refused(*command)
        kill(workers_of()[0])
        wait_until(lambda: len(read_events(store)) == 3)
        wait_for_step(len(losses(out)) + 5, process, out)
        kill(*workers_of(), process.pid)
        told, _ = process.communicate(timeout=60)
    first, failure, second = read_events(store)
    assert (first["attempt"], first["step"], first["world_size"]) == (1, 0, 2)
    assert re.fullmatch(r"worker [01] died", failure["cause"])
    assert second["attempt"] == 2
    assert second["step"] > 35  # from a snapshot, where the last commit was after step 35
    assert second["redone"] <= 10
    assert f"{failure['cause']}: starting the workers again" in told
    assert f"attempt 2: 2 workers from step {second['step']}, {second['redone']} steps redone" in told

    done = maestream(*command, RAY_ADDRESS=one_ray)
    assert "attempt 3" in done.stdout
    rows = read_metrics(store)
    assert [row["step"] for row in rows] == list(range(200))
    assert (rows[0]["attempt"], rows[-1]["attempt"]) == (1, 3)
    assert [row["loss"] for row in rows] == losses(whole)  # bit for bit
    assert not Path("/dev/shm", f"maestream-{json.loads((out / 'run.json').read_text())['run_id']}").exists()


@pytest.mark.soak
def test_failures_without_progress_stop_the_run_with_their_cause(
    recipe: Path, scenes: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with running(words(recipe, scenes.store.url, out, "checkpoint={}")) as process:
        for attempt in range(1, HOPELESS + 1):
            wait_until(
                lambda n=attempt: (out / "run.json").exists() and len(read_starts(open_store(str(out)))) == n
            )
            kill(workers_of()[0])
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert printed.count("died: starting the workers again") == HOPELESS - 1
    assert "died: giving up, nothing gets any further" in printed
    assert "Traceback" not in printed


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", ["workers=1", "workers=2"])
def test_killed_again_and_again(recipe: Path, scenes: Dataset, tmp_path: Path, workers: str) -> None:
    """Ten kills at random steps, of a worker, of the driver and of all in turn; the joined run is bit-equal."""
    rng, out = random.Random(0), tmp_path / "run"
    longer = (workers, "epochs=600")  # workers that lost their driver train on for a second or two
    maestream(*words(recipe, scenes.store.url, tmp_path / "whole", *longer))
    command = words(recipe, scenes.store.url, out, *longer)
    for round_ in range(5):
        with running(command) as process:
            done = len(losses(out)) if round_ else 0
            wait_for_step(done + rng.randrange(1, 80), process, out)
            kill(workers_of()[0])
            wait_for_step(len(losses(out)) + rng.randrange(1, 80), process, out)
            kill(*(workers_of() if round_ % 2 else []), process.pid)
    maestream(*command)
    rows = read_metrics(open_store(str(out)))
    assert rows[-1]["attempt"] == 11
    assert [row["loss"] for row in rows] == losses(tmp_path / "whole")


@pytest.mark.usefixtures("on_one_ray")
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
    out = printed("reconstruct", store.url, "--data", remote.store.url, "--grid", f"{s3}/r.png", "--count", 8)
    assert "step 200: error over masked" in out
    assert open_store(s3).read("r.png").startswith(b"\x89PNG")


@pytest.mark.usefixtures("on_one_ray")
def test_what_only_a_person_can_mend_stops_all_ranks_with_exit_code_2(
    recipe: Path, scenes: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(scenes.store.root, tmp_path / "data")
    shard = sorted((tmp_path / "data").glob("*.tar"))[1]
    shard.unlink()
    command = words(recipe, str(tmp_path / "data"), tmp_path / "run", "epochs=4")
    message = refused(*command, process=True)
    assert f"{shard.name} is missing" in message
    assert json.loads((tmp_path / "run" / "failed.json").read_text())["reason"] in message
    assert read_starts(open_store(str(tmp_path / "run"))) == [0]  # it was not tried again
    shutil.copy(Path(scenes.store.root) / shard.name, shard)
    other = build_dataset("synthetic:?count=70&classes=7&seed=9", str(tmp_path / "other"))
    assert "another dataset" in refused(*words(recipe, other.store.url, tmp_path / "run", "epochs=4"))
    assert f"the last time it stopped, because {shard}" in maestream(*command).stdout
    assert not (tmp_path / "run" / "failed.json").exists()


def test_nothing_is_left_running() -> None:
    """Embedded Rays end with their driver, also the one that was killed."""
    deadline = time.monotonic() + 30
    while (left := _raylets_of_this_test()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def _raylets_of_this_test() -> list[str]:
    """Command lines of Ray daemons whose folder is that of these tests."""
    lines = [command_line(process) for process in psutil.process_iter() if process.pid != os.getpid()]
    ours = [line for line in lines if os.environ["RAY_TMPDIR"] in line]
    return [line[:120] for line in ours if "raylet" in line or "gcs_server" in line]
