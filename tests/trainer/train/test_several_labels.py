"""Fine-tuning and probing on several classes or numbers: learnt, the same at any world size, resumed, and used afterwards."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import LabelKind
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.loading.loader import centred_batch
from pipeline.storage.store import open_store
from tests.support.data.labelled import labelled_dataset
from tests.support.runs import losses
from tests.support.training.gloo import gloo_group, run_workers
from tests.support.training.label_runs import KINDS, config_of
from tests.support.training.small_runs import request_after, weights
from trainer.evaluate.features import predict_shard
from trainer.evaluate.inference_shard import InferenceShard
from trainer.evaluate.predictions import Predictions, score
from trainer.group.group import Group
from trainer.group.requests import Request
from trainer.labels.labels import LABELS, Labels, read_labels
from trainer.run.metrics import read_metrics
from trainer.run.run import create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.weights.api import load_classifier
from trainer.weights.pretrained import read_model_info

pytestmark = pytest.mark.integration

SEVERAL: tuple[LabelKind, ...] = ("classes", "numbers")
OFF = {"magnitude": 0, "erase": 0, "mixup": 0, "cutmix": 0, "smoothing": 0}
COLOURS = {"data": {"decoder": "cpu", "lanes": 4, "block": 8, "threads": 1, "val_crop": 1.0, "flips": False}}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[LabelKind, Dataset]:
    folder = tmp_path_factory.mktemp("several")
    return {kind: labelled_dataset(folder / kind, kind) for kind in SEVERAL}


def config_for(task: str, dataset: Dataset, **changes: Any) -> Any:
    """A config with all augmentation that its labels allow."""
    if task == "finetune" and dataset.manifest.labels == "numbers":
        changes = {"mixing": {"mixup": 0, "cutmix": 0, "smoothing": 0}, **changes}
    return config_of(task, "scratch", dataset.store.url, **changes)


def train(task: str, dataset: Dataset, out: Path, stop: int | None = None, **changes: Any) -> bool:
    config, run = open_run(str(out), config_for(task, dataset, **changes), dataset)
    create_run(config, run, dataset)
    callbacks = Callbacks(request_after(stop, Request.SAVE)) if stop else Callbacks()
    return KINDS[task][1](config, dataset, run, Worker(), callbacks)


def _worker(rank: int, world_size: int, task: str, data: str, out: str) -> None:
    torch.set_num_threads(1)
    with gloo_group(f"{out}.rendezvous", rank, world_size) as group:
        dataset = open_dataset(data)
        config, run = open_run(out, config_for(task, dataset), dataset)
        assert KINDS[task][1](config, dataset, run, Worker(group), Callbacks())


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("task", KINDS)
def test_world_size_changes_nothing(
    task: str, kind: LabelKind, datasets: dict[LabelKind, Dataset], tmp_path: Path
) -> None:
    """Mixing, losses, standardised numbers and all measures are the same with three workers as with one."""
    dataset = datasets[kind]
    for out, world_size in (("alone", 1), ("many", 3)):
        config, run = open_run(str(tmp_path / out), config_for(task, dataset), dataset)
        create_run(config, run, dataset)
        run_workers(_worker, world_size, task, dataset.store.url, str(tmp_path / out))
    alone, many = losses(tmp_path / "alone"), losses(tmp_path / "many")
    assert len(alone) == 10
    assert many == pytest.approx(alone, rel=1e-9, abs=0)
    ours, theirs = weights(tmp_path / "alone"), weights(tmp_path / "many")
    for name, tensor in ours.items():
        assert torch.allclose(theirs[name], tensor, rtol=1e-7, atol=1e-9), name
    rows = [read_metrics(open_store(str(tmp_path / out)))[-1] for out in ("alone", "many")]
    measured = {"classes": ("val_map", "val_loss"), "numbers": ("val_r2", "val_mae", "val_loss")}[kind]
    assert {name for name in rows[0] if name.startswith("val_")} == {*measured, "val_bad"}
    for name in measured:
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-9), name


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_sample_without_a_label_stops_training(kind: LabelKind, tmp_path: Path) -> None:
    dataset = labelled_dataset(tmp_path / "data", kind, samples=16, missing=1)
    with pytest.raises(UserError, match=r"(no|without a) label: `maestream shards view SRC DEST"):
        train("finetune", dataset, tmp_path / "run")


SCORED: tuple[tuple[LabelKind, int], ...] = (("classes", 3), ("classes", 37), ("numbers", 3), ("numbers", 37))


def score_part(group: Group, kind: LabelKind, samples: int) -> dict[str, float]:
    """Scores of 70 classes or numbers, of which each rank knows the outputs of its own samples."""
    rng = np.random.default_rng(samples)
    outputs = rng.normal(size=(samples, 70)).round(1)
    truth = (
        (rng.random((samples, 70)) < 0.2).astype(np.float32) if kind == "classes" else outputs + rng.random()
    )
    readable = np.arange(samples) % 7 != 2
    rows = np.array_split(np.arange(samples), group.size)[group.rank]
    own = Predictions(*(torch.from_numpy(values[rows]) for values in (outputs, truth, readable)))
    labels = Labels(kind=kind, outputs=70, mean=(0.0,) * 70, deviation=(2.0,) * 70)
    dataset: Any = SimpleNamespace(samples=samples, store=SimpleNamespace(url="shards/val"))
    return score(own, labels, dataset, Worker(group))


def _score(rank: int, world_size: int, folder: str) -> None:
    with gloo_group(f"{folder}/rendezvous-{world_size}", rank, world_size) as group:
        found = [score_part(group, kind, samples) for kind, samples in SCORED]
        Path(folder, f"{world_size}-{rank}.json").write_text(json.dumps(found))


def test_scores_are_equal_at_any_world_size(tmp_path: Path) -> None:
    """Also on ranks that have no samples, and with samples that cannot be read."""
    alone = [score_part(Group(), kind, samples) for kind, samples in SCORED]
    for world_size in (2, 5):
        run_workers(_score, world_size, str(tmp_path))
        for rank in range(world_size):
            assert json.loads((tmp_path / f"{world_size}-{rank}.json").read_text()) == alone


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_stopped_run_resumes(kind: LabelKind, datasets: dict[LabelKind, Dataset], tmp_path: Path) -> None:
    dataset, no_snapshots = datasets[kind], {"checkpoint": {"snapshots": None}}
    assert train("finetune", dataset, tmp_path / "alone", **no_snapshots)
    for stop in (3, None):
        assert train("finetune", dataset, tmp_path / "often", stop, **no_snapshots) == (stop is None)
    assert losses(tmp_path / "often") == pytest.approx(losses(tmp_path / "alone"), rel=1e-9, abs=0)
    ours, theirs = weights(tmp_path / "alone"), weights(tmp_path / "often")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("kind", SEVERAL)
def test_labels_are_learnt_and_predicted_in_their_units(
    task: str, kind: LabelKind, datasets: dict[LabelKind, Dataset], tmp_path: Path
) -> None:
    """What the run measured, a later evaluation and scikit-learn on the loaded model's outputs agree."""
    dataset, out = datasets[kind], tmp_path / "run"
    changes: dict[str, Any] = {"epochs": 12.0, "evaluate_every": 6.0, **COLOURS}
    if task == "finetune":
        changes |= {"mixing": OFF, "optim": {"blr": 0.05, "warmup_epochs": 0.5, "layer_decay": 1.0}}
    else:  # on an encoder with random weights
        changes |= {"optim": {"blr": 500.0 if kind == "classes" else 30.0, "warmup_epochs": 0.5}}
    assert train(task, dataset, out, **changes)
    then = read_metrics(open_store(str(out)))[-1]
    if kind == "classes":
        assert then["val_map"] > 95
    else:
        assert then["val_r2"] > (0.8 if task == "finetune" else 0)

    labels = read_labels(open_store(str(out)))
    assert labels is not None
    assert (labels.kind, labels.outputs) == (kind, 3)
    assert read_model_info(str(out)).labels == labels
    shard = InferenceShard(str(out), None, dataset.store.url, 0, dataset.samples, 1.0, batch=9)
    now = score(predict_shard(shard)[1], labels, dataset, Worker())
    for name, value in now.items():
        assert value == pytest.approx(then[name], rel=1e-4), name  # during training it was float64

    batch = centred_batch(dataset, make_decoder("cpu", 32, 1), np.arange(dataset.samples), 1.0)
    with torch.no_grad():
        outputs = load_classifier(str(out)).double()(batch.images).numpy()
    actual = batch.labels.double().numpy()
    if kind == "classes":
        expected = {"val_map": 100 * average_precision_score(actual, outputs, average="macro")}
    else:
        expected = {"val_r2": r2_score(actual, outputs), "val_mae": mean_absolute_error(actual, outputs)}
        np.testing.assert_allclose(labels.mean, actual.mean(axis=0), rtol=1e-9)
        np.testing.assert_allclose(labels.deviation, actual.std(axis=0), rtol=1e-9)
    for name, value in expected.items():
        assert then[name] == pytest.approx(value, rel=1e-4), name
    assert json.loads((out / LABELS).read_text())["kind"] == kind
