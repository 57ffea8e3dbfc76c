"""A dataset and two runs that the version before the sub-packages wrote still open, with the results of that version.

`before_subpackages/` was written by commit b7a6acc: a dataset of 60 synthetic images, a pre-training run that was stopped
with Ctrl-C after 46 of 60 steps, and a finished fine-tuning run, both in float64. `expected.json` has the results of b7a6acc
itself: the remaining steps, the evaluation of the classifier, and digests of its exported weights. Pictures and TensorBoard
files were removed. Do not write these files anew: their age is what is tested.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.dataset.dataset import open_dataset
from pipeline.storage.store import open_store
from tests.support.command_line import printed
from trainer.run.metrics import read_metrics

pytestmark = pytest.mark.integration

OLD = Path(__file__).with_name("before_subpackages")
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())


def digests(weights: dict[str, np.ndarray]) -> dict[str, str]:
    """A digest of dtype, shape and bytes of each tensor."""
    return {
        name: hashlib.sha256(str((array.dtype.str, array.shape)).encode() + array.tobytes()).hexdigest()[:16]
        for name, array in sorted(weights.items())
    }


def test_old_dataset_is_undamaged_and_has_the_same_order() -> None:
    dataset = open_dataset(str(OLD / "dataset"))
    assert dataset.samples == 60
    assert dataset.fingerprint == json.loads((OLD / "pretrain_stopped/run.json").read_text())["fingerprint"]
    printed("shards", "verify", OLD / "dataset", "--tasks", 1)
    order = printed(
        "order",
        OLD / "dataset",
        "--global-batch",
        12,
        "--seed",
        0,
        "--epoch",
        1,
        "--world-size",
        2,
        "--rank",
        1,
    )
    assert order == (OLD / "order.jsonl").read_text()


@pytest.mark.usefixtures("on_one_ray")
def test_stopped_run_continues_with_the_losses_of_the_old_version(tmp_path: Path) -> None:
    run = tmp_path / "pretrain"
    shutil.copytree(OLD / "pretrain_stopped", run)
    printed(
        "pretrain", "--config", OLD / "pretrain.yaml", "--data", OLD / "dataset", "--out", run, "--ledger"
    )
    rows = [row for row in read_metrics(open_store(str(run))) if row["attempt"] == 2]
    assert [row["step"] for row in rows] == list(range(46, 60))
    assert [row["sample_ids"] for row in rows] == [row["sample_ids"] for row in EXPECTED["continued"]]
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx([row["loss"] for row in EXPECTED["continued"]], rel=1e-9, abs=0)
    knn = printed("knn", run, "--data", OLD / "dataset", "--val", OLD / "dataset", "--tasks", 1)
    assert "85.00" in EXPECTED["knn"]
    assert "85.00" in knn


def test_finished_classifier_has_the_accuracy_and_weights_of_the_old_version(tmp_path: Path) -> None:
    run = tmp_path / "finetune"
    shutil.copytree(OLD / "finetune", run)
    shutil.rmtree(run / "evaluations")
    printed("evaluate", run, "--data", OLD / "dataset", "--tasks", 1)
    [file] = (run / "evaluations").iterdir()
    result = json.loads(file.read_text())
    assert {name: result[name] for name in EXPECTED["evaluate"]} == pytest.approx(
        EXPECTED["evaluate"], rel=1e-9
    )
    exported = tmp_path / "timm"
    printed("export", run, exported, "--format", "timm")
    assert digests(load_file(exported / "model.safetensors")) == EXPECTED["finetune_timm"]
