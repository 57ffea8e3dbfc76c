"""Fine-tuning, probing, evaluation and studies survive kills like pre-training does."""

import csv
import json
import os
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.cli import evaluate
from pipeline.dataset.dataset import Dataset
from pipeline.storage.store import open_store
from tests.support.command_line import printed, refused
from tests.support.datasets import build_dataset
from tests.support.processes import processes
from tests.support.runs import kill, kill_a_worker, losses, running, wait_for_step, wait_until
from tests.support.training.reference_run import train_reference_run
from trainer.run.events import read_events
from trainer.run.metrics import read_metrics

pytestmark = pytest.mark.integration

COMMON = """
global_batch: 12
log_every: 5
precision: float32
micro_batch: 2
model: {image_size: 32, patch_size: 8, width: 24, depth: 2, heads: 3}
data: {lanes: 6, block: 8}
"""
RECIPES = {
    "pretrain": "epochs: 4\noptim: {blr: 0.05, warmup_epochs: 1}\n",
    "finetune": "epochs: 40\nworkers: 2\noptim: {blr: 0.05, warmup_epochs: 1, ema: 0.9}\nevaluate_every: 20\n",
    "linprobe": "epochs: 60\noptim: {blr: 5.0, warmup_epochs: 1}\nevaluate_every: 20\n",
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    paths = {}
    for task, more in RECIPES.items():
        paths[task] = folder / f"{task}.yaml"
        paths[task].write_text(COMMON + more)
    return paths


@pytest.fixture(scope="module")
def pretrained(recipes: dict[str, Path], scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    train_reference_run("pretrain", recipes["pretrain"], (), scenes.store.url, out)
    return out


@pytest.mark.soak
@pytest.mark.usefixtures("on_one_ray")
@pytest.mark.parametrize("task", ["finetune", "linprobe"])
def test_a_killed_worker_changes_nothing(
    task: str, recipes: dict[str, Path], pretrained: Path, scenes: Dataset, tmp_path: Path
) -> None:
    data, out = scenes.store.url, tmp_path / "run"
    overrides = (f"init.run={pretrained}", f"data.val={data}")
    train_reference_run(task, recipes[task], overrides, data, tmp_path / "whole")
    init, val = os.path.relpath(pretrained), os.path.relpath(data)  # workers run in other folders
    options = ("--config", recipes[task], "--init", init, "--data", data, "--val", val, "--out", out)
    with running((task, *options)) as process:
        wait_for_step(40, process, out)
        kill_a_worker()
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
    assert losses(out) == losses(tmp_path / "whole")  # bit for bit
    ours, theirs = (read_metrics(open_store(str(path)))[-1] for path in (out, tmp_path / "whole"))
    assert ours["attempt"] == 2
    assert ours["val_top1"] == theirs["val_top1"]
    assert f"top-1 {ours['val_top1']:.2f} %" in text
    told = [event for event in read_events(open_store(str(out))) if event["event"] == "evaluated"]
    assert told[-1]["val_top1"] == ours["val_top1"]

    # `evaluate` gives the same result
    said = printed("evaluate", out, "--data", data, "--tasks", 1)
    assert f"top-1 {ours['val_top1']:.2f} %" in said
    (kept,) = (out / "evaluations").iterdir()
    assert json.loads(kept.read_text())["val_top5"] == pytest.approx(ours["val_top5"])


def test_knn_and_features(
    pretrained: Path, scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several tasks each, whose ranges end in the middle of a batch."""
    monkeypatch.setattr(evaluate, "TASK_SAMPLES", 30)
    data = scenes.store.url
    about = ("--data", data, "--tasks", 1, "--batch", 8)
    out = printed("knn", pretrained, *about, "--val", data, "--neighbours", 1)
    # Each image is its own nearest neighbour.
    assert "top-1 100.00 %, top-5 100.00 % with 1 nearest neighbour, 70 images against 70" in out
    mean, patches = tmp_path / "mean", tmp_path / "patches"
    asked = ("features", pretrained, *about, "--out", mean, "--pool", "mean")
    assert f"wrote features of 70 images to {mean}, skipped 0 bad images" in printed(*asked)
    files = sorted(mean.glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in files])
    assert len(files) == 3
    assert table["sample"].to_pylist() == list(range(70))
    assert table["key"].to_pylist() == scenes.keys(range(70))
    assert table.schema.metadata[b"shape"] == b"[24]"

    # Existing files are kept; other settings in the same folder are refused.
    files[1].unlink()
    before = [path.stat().st_mtime_ns for path in (files[0], files[2])]
    assert f"wrote features of 70 images to {mean}, skipped 0 bad images" in printed(*asked)
    assert files[1].exists()
    assert before == [path.stat().st_mtime_ns for path in (files[0], files[2])]
    assert "features with other settings (crop 0.875 → 0.5)" in refused(*asked, "--crop", 0.5)
    assert "is not empty (checkpoints" in refused(*asked[:-4], "--out", pretrained)

    asked = ("features", pretrained, *about, "--out", patches, "--pool", "patches", "--image-size")
    monkeypatch.setattr(evaluate, "TASK_FEATURE_BYTES", 20 * 5 * 8 * 24 * 4)  # 20 samples per task
    printed(*asked, "40x64")
    assert len(list(patches.glob("*.parquet"))) == 4
    table = pq.read_table(patches / "part-0000000000.parquet")
    assert table.schema.metadata[b"shape"] == b"[5, 8, 24]"
    assert len(table["feature"][0]) == 5 * 8 * 24
    assert "is not divisible" in refused(*asked, "41x64")
    assert "expected one number, or HEIGHTxWIDTH" in refused(*asked, "large")
    assert "has no checkpoint of step 7" in refused("knn", pretrained, *about, "--val", data, "--step", 7)


def test_unsuitable_models_and_datasets_are_refused(
    pretrained: Path, recipes: dict[str, Path], scenes: Dataset, tmp_path: Path
) -> None:
    data = scenes.store.url
    other = build_dataset("synthetic:?count=20&classes=3", str(tmp_path / "other")).store.url
    assert "has no classes" in refused("evaluate", pretrained, "--data", data)
    probed = tmp_path / "probed"
    changes = (f"init.run={pretrained}", "epochs=2", "evaluate_every=9")
    train_reference_run("linprobe", recipes["linprobe"], changes, data, probed)
    assert "other classes (3) than" in refused("evaluate", probed, "--data", other)
    options = ("--config", recipes["linprobe"], "--data", data, "--out", tmp_path / "out")
    assert "have different classes" in refused("linprobe", *options, "--init", pretrained, "--val", other)
    assert "init is missing: pass --init RUN" in refused("linprobe", *options)
    assert "is not a run" in refused("linprobe", *options, "--init", data)
    assert "is a run of `maestream pretrain`" in refused(
        "linprobe", *options[:-1], pretrained, "--init", pretrained
    )


def study_command(recipes: dict[str, Path], data: str, out: Path) -> tuple[object, ...]:
    recipe_options = ("--pretrain", recipes["pretrain"], "--linprobe", recipes["linprobe"])
    return ("study", "target", *recipe_options, "--data", data, "--val", data, "--out", out)


def assert_all_trials_are_measured(out: Path) -> None:
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["trial"] for row in rows] == ["pixels", "normalised pixels"]
    assert all(0 <= float(row["linprobe_top1"]) <= 100 for row in rows)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_measures_its_trials(recipes: dict[str, Path], scenes: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "study"
    command = study_command(recipes, scenes.store.url, out)
    short = ("pretrain.optim.warmup_epochs=0", "linprobe.epochs=2")
    assert "normalised pixels: " in printed(*command, "--tasks", 1, "pretrain.epochs=1", *short)
    assert_all_trials_are_measured(out)
    assert "2 trials, 2 of them done" in printed(*command, "--tasks", 1, "pretrain.epochs=1", *short)
    assert "unknown study masks; expected one of augmentation" in refused("study", "masks", *command[2:])
    assert "another study" in refused("study", "schedule", *command[2:])
    assert "another study (pretrain.epochs 1.0 → 5.0)" in refused(*command, "pretrain.epochs=5", *short)
    assert "where RECIPE is pretrain or linprobe" in refused(*command, "epochs=5")


@pytest.mark.soak
@pytest.mark.usefixtures("on_one_ray")
def test_a_killed_study_resumes(recipes: dict[str, Path], scenes: Dataset, tmp_path: Path) -> None:
    """It is killed while, for example, one trial is evaluated and the other still pre-trains."""
    out = tmp_path / "study"
    command = study_command(recipes, scenes.store.url, out)
    with running((*command, "--tasks", 2)) as process:
        wait_until(lambda: list(out.glob("*/linprobe/metrics.jsonl")))
        trials = processes("ray::run_trial", os.getpid())
        kill(process.pid)
        process.wait()
        wait_until(lambda: not any(map(psutil.pid_exists, trials)))
    began = {path: path.read_text() for path in out.glob("*/*/run.json")}
    assert "2 trials, 0 of them done" in printed(*command, "--tasks", 1)
    assert len(began) >= 2
    for path, text in began.items():
        assert json.loads(path.read_text())["run_id"] == json.loads(text)["run_id"]  # the runs were resumed
    assert_all_trials_are_measured(out)
