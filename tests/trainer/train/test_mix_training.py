"""Training on a mix: the same at any world size, with the loss of each part in the metrics."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset.dataset import open_dataset
from pipeline.storage.store import open_store
from pipeline.views.mix import make_mix, parse_weight
from tests.support.datasets import build_dataset
from tests.support.training.small_runs import SMALL, spawn, train
from trainer.run.metrics import read_metrics

pytestmark = pytest.mark.integration


def test_losses_by_part_and_ledger_of_a_mix(tmp_path: Path) -> None:
    sources = [build_dataset(f"synthetic:?count={n}&seed={n}", str(tmp_path / f"d{n}")) for n in (24, 20, 4)]
    make_mix(sources, [parse_weight(text) for text in ("1", "0.5", "3")], open_store(str(tmp_path / "mix")))
    mixed = open_dataset(str(tmp_path / "mix"))
    changes = {"epochs": 4.0, "data": {**SMALL["data"], "lanes": 4}}  # of 3 steps: (24 + 10 + 12) // 12
    train(mixed, tmp_path / "alone", micro_batch=12, **changes)
    spawn(3, mixed.store.url, str(tmp_path / "many"), {"micro_batch": 4, **changes})
    alone, many = (read_metrics(open_store(str(tmp_path / name))) for name in ("alone", "many"))
    assert len(many) == 12
    names = ["loss/d24", "loss/d20", "loss/d4"]
    counts = np.zeros(48, np.int64)
    for ours, theirs in zip(alone, many, strict=True):
        ids = np.array(theirs["sample_ids"])
        counts += np.bincount(ids, minlength=48)
        present = np.bincount(mixed.part_of(ids), minlength=3)
        assert [name for name in names if name in theirs] == [
            n for n, count in zip(names, present, strict=True) if count
        ]
        for name in {"loss", *names} & theirs.keys():
            assert theirs[name] == pytest.approx(ours[name], rel=1e-9)
        parts = sum(theirs.get(n, 0) * count for n, count in zip(names, present, strict=True))
        assert theirs["loss"] == pytest.approx(parts / 12, rel=1e-9)
    expected = np.repeat([4, 2, 12], [24, 20, 4])
    assert (counts <= expected).all()
    assert (expected - counts).sum() == 4 * 46 - 12 * 12  # what is dropped: 10 samples per epoch


def test_rows_of_a_plain_dataset_are_as_before(tmp_path: Path) -> None:
    plain = build_dataset("synthetic:?count=24", str(tmp_path / "plain"))
    train(plain, tmp_path / "run", epochs=1.0)
    rows = read_metrics(open_store(str(tmp_path / "run")))
    assert len(rows) == 2
    assert not [name for row in rows for name in row if name.startswith("loss/")]
