"""Commands for labels that are several classes or numbers: what they print, write and refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import LabelKind
from pipeline.storage.store import open_store
from tests.support.command_line import printed, refused
from tests.support.data.foreign_tars import index, noise, pack
from tests.support.data.labelled import labelled_dataset
from tests.support.training.label_runs import SHAPE, config_of
from tests.support.training.small_runs import train as pretrain
from trainer.evaluate.features import label_column, labels_from_column
from trainer.run.events import Events
from trainer.run.metrics import read_metrics
from trainer.run.run import create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.train.finetune import finetune
from trainer.weights.api import load_classifier

pytestmark = pytest.mark.integration

SEVERAL: tuple[LabelKind, ...] = ("classes", "numbers")
NO_MIXING = ("mixing.mixup=0", "mixing.cutmix=0", "mixing.smoothing=0")
RECIPE = """
global_batch: 12
epochs: 1
micro_batch: 12
optim: {warmup_epochs: 0}
model: {image_size: 32, patch_size: 8, width: 24, depth: 2, heads: 3}
data: {lanes: 4, block: 8}
"""


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[LabelKind, Dataset]:
    folder = tmp_path_factory.mktemp("several")
    return {kind: labelled_dataset(folder / kind, kind) for kind in SEVERAL}


@pytest.fixture(scope="module")
def runs(
    datasets: dict[LabelKind, Dataset], tmp_path_factory: pytest.TempPathFactory
) -> dict[LabelKind, Path]:
    """A fine-tuned model for each kind of labels."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, dataset in datasets.items():
        changes: dict[str, Any] = {"mixing": {"mixup": 0, "cutmix": 0, "smoothing": 0}}
        changes["model"] = {**SHAPE, "pool": "class"}  # transformers has no other heads
        config = config_of("finetune", "scratch", dataset.store.url, precision="float32", **changes)
        config, run = open_run(str(folder / kind), config, dataset)
        create_run(config, run, dataset)
        events = Events(run)
        callbacks = Callbacks(on_event=lambda event, events=events: events.append({"time": 0.0, **event}))
        assert finetune(config, dataset, run, Worker(), callbacks)
    return {kind: folder / kind for kind in datasets}


@pytest.mark.parametrize("kind", SEVERAL)
def test_measures_are_printed_written_and_reported(
    kind: LabelKind, runs: dict[LabelKind, Path], datasets: dict[LabelKind, Dataset], tmp_path: Path
) -> None:
    run, data = runs[kind], datasets[kind].store.url
    row = read_metrics(open_store(str(run)))[-1]
    expected = {
        "classes": f"mAP {row.get('val_map', 0):.2f} %, loss {row['val_loss']:.4f}",
        "numbers": f"R² {row.get('val_r2', 0):.4f}, MAE {row.get('val_mae', 0):.4g}, loss {row['val_loss']:.4f}",
    }[kind]
    assert f"step 10: {expected}, 60 images, 0 of them bad" in printed(
        "evaluate", run, "--data", data, "--tasks", 1
    )
    (kept,) = (run / "evaluations").iterdir()
    main = {"classes": "val_map", "numbers": "val_r2"}[kind]
    assert json.loads(kept.read_text())[main] == pytest.approx(row[main], rel=1e-5)

    printed("report", run, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    titles = {"classes": "Mean average precision during training", "numbers": "R² during training"}
    assert titles[kind] in page
    for text in expected.split(", "):
        assert text.split()[1] in page  # the value
    table = printed("checkpoints", run)
    assert {"classes": "mAP", "numbers": "R²"}[kind] in table
    assert expected.split()[1].rstrip(",") in table


@pytest.mark.parametrize("kind", SEVERAL)
def test_exports_predict_the_same_and_say_what(
    kind: LabelKind, runs: dict[LabelKind, Path], datasets: dict[LabelKind, Dataset], tmp_path: Path
) -> None:
    printed("export", runs[kind], tmp_path / "out", "--format", "safetensors")
    images = torch.randint(
        0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        ours, theirs = (load_classifier(str(place))(images) for place in (runs[kind], tmp_path / "out"))
    assert torch.equal(ours, theirs)
    if kind == "numbers":
        assert (ours > 500).all()  # in units of the labels, 1000.5 and more
    # Other projects do not know of standardised numbers.
    for project in ("timm", "transformers"):
        printed("export", runs[kind], tmp_path / project, "--format", project)
        with torch.no_grad():
            torch.testing.assert_close(load_classifier(str(tmp_path / project))(images), ours)
    config = json.loads((tmp_path / "transformers/config.json").read_text())
    problems = {"classes": "multi_label_classification", "numbers": "regression"}
    assert config["problem_type"] == problems[kind]
    card = (tmp_path / "out/README.md").read_text()
    assert {"classes": "several classes per image", "numbers": "3 numbers per image"}[kind] in card
    assert {"classes": "validation mAP, %: ", "numbers": "validation R²: "}[kind] in card
    measured = {
        printed("evaluate", place, "--data", datasets[kind].store.url, "--tasks", 1, "--crop", 1)
        .splitlines()[-1]
        .partition(": ")[2]
        for place in (runs[kind], tmp_path / "out")
    }
    assert len(measured) == 1


@pytest.mark.parametrize("kind", SEVERAL)
def test_neighbours_and_features(
    kind: LabelKind, runs: dict[LabelKind, Path], datasets: dict[LabelKind, Dataset], tmp_path: Path
) -> None:
    run, data = runs[kind], datasets[kind].store.url
    said = printed("knn", run, "--data", data, "--val", data, "--tasks", 1, "--neighbours", 1)
    # Each image is its own nearest neighbour.
    assert {"classes": "mAP 100.00 % with", "numbers": "R² 1.0000, MAE 0 with"}[kind] in said
    assert "1 nearest neighbour, 60 images against 60" in said
    printed("features", run, "--data", data, "--tasks", 1, "--out", tmp_path / "features")
    (part,) = (tmp_path / "features").glob("*.parquet")
    column = pq.read_table(part)["label"]
    actual = torch.from_numpy(datasets[kind].labels(datasets[kind].locate(np.arange(60)).row))
    assert torch.equal(labels_from_column(column, kind, 3), actual)
    first = actual[0].nonzero()[:, 0].tolist() if kind == "classes" else actual[0].tolist()
    assert column[0].as_py() == first


@pytest.mark.parametrize("kind", SEVERAL)
def test_neighbours_are_measured_during_pretraining(
    kind: LabelKind, datasets: dict[LabelKind, Dataset], tmp_path: Path
) -> None:
    dataset = datasets[kind]
    pretrain(dataset, tmp_path / "run", epochs=2.0, knn={"val": dataset.store.url, "every": 1})
    last = read_metrics(open_store(str(tmp_path / "run")))[-1]
    names = {name for name in last if name.startswith("knn_")}
    assert names == {"knn_step", *{"classes": ["knn_map"], "numbers": ["knn_r2", "knn_mae"]}[kind]}
    assert last["knn_map" if kind == "classes" else "knn_r2"] > (50 if kind == "classes" else 0)


def test_missing_labels_stay_missing_in_columns() -> None:
    for kind, rows in (("classes", [[1.0, 0, 1], [0, 0, 0]]), ("numbers", [[0.5, 2, -1], [3, 4, 5]])):
        labels = torch.tensor([*rows, [float("nan")] * 3])
        column = label_column(labels, kind)
        assert column.null_count == 1
        again = labels_from_column(pa.chunked_array([column]), kind, 3)
        torch.testing.assert_close(again, labels, equal_nan=True)


def test_what_cannot_be_trained_or_evaluated_is_refused_before_anything_is_written(
    runs: dict[LabelKind, Path], datasets: dict[LabelKind, Dataset], scenes: Dataset, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    classes, numbers = (datasets[kind].store.url for kind in SEVERAL)

    def finetune_refused(data: str, val: str, *overrides: str) -> str:
        options = ("--config", recipe, "--init", "scratch", "--out", out)
        said = refused("finetune", *options, "--data", data, "--val", val, *overrides)
        assert not out.exists()
        return said

    assert "set mixing.mixup=0 mixing.cutmix=0 mixing.smoothing=0" in finetune_refused(numbers, numbers)
    kinds = "have different kinds of labels (one class per image, and several classes per image)"
    assert kinds in finetune_refused(classes, scenes.store.url)
    assert "(several classes per image, and numbers)" in finetune_refused(numbers, classes, *NO_MIXING)
    unlabelled = {
        kind: labelled_dataset(tmp_path / f"gaps-{kind}", kind, samples=20, missing=2).store.url
        for kind in SEVERAL
    }
    assert "sample 0018 has no label" in finetune_refused(numbers, unlabelled["numbers"], *NO_MIXING)
    assert "sample 0018 has no label" in finetune_refused(unlabelled["numbers"], numbers, *NO_MIXING)
    assert "sample 0018 has no label" in finetune_refused(classes, unlabelled["classes"])
    same = one_label(tmp_path / "same", [1.5])
    assert "all images have the same label" in finetune_refused(same, same, *NO_MIXING)
    two = one_label(tmp_path / "two", [1.5, 2])
    assert "have different numbers per image (2 and 3)" in finetune_refused(numbers, two, *NO_MIXING)

    said = refused("evaluate", runs["classes"], "--data", numbers)
    assert "has another kind of labels (numbers) than" in said
    assert "was trained on (several classes per image)" in said
    assert "has another kind of labels (one class" in refused(
        "evaluate", runs["numbers"], "--data", scenes.store.url
    )
    assert "have different kinds of labels" in refused(
        "knn", runs["classes"], "--data", classes, "--val", numbers
    )
    assert "has other numbers per image (2) than" in refused("evaluate", runs["numbers"], "--data", two)
    study = ("--pretrain", recipe, "--linprobe", recipe, "--out", out)
    said = refused("study", "target", *study, "--data", numbers, "--val", numbers)
    assert "a study compares top-1 accuracies" in said


def one_label(folder: Path, label: list[float]) -> str:
    """A dataset of images with one label."""
    files: dict[str, bytes] = {}
    for i in range(12):
        files |= {f"{i}.jpg": noise(i, 40), f"{i}.json": json.dumps({"label": label}).encode()}
    pack(folder / "0.tar", files)
    index(folder, checksums=True)
    return str(folder)
