"""Promise 5: a few bad samples never stop a run, and all are listed; too many stop it."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.runs import losses
from tests.support.training.gloo import run_workers
from tests.support.training.small_runs import train, train_worker
from trainer.run.checkpoint import committed_steps
from trainer.run.metrics import read_metrics

pytestmark = pytest.mark.integration

VICTIMS = [3, 20, 41, 55]


@pytest.fixture(scope="module")
def damaged(scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The scenes dataset with one byte changed in each of four images."""
    folder = tmp_path_factory.mktemp("damaged") / "scenes"
    shutil.copytree(scenes.store.root, folder)
    located = scenes.locate(VICTIMS)
    for i in range(len(VICTIMS)):
        path = folder / scenes.shard_name(int(located.shard[i]))
        data = bytearray(path.read_bytes())
        data[int(located.offset[i]) + int(located.size[i]) // 2] ^= 0xFF
        path.write_bytes(data)
    return open_dataset(str(folder))


def named(out: Path) -> list[dict]:
    return json.loads((out / "bad-samples.json").read_text())


def test_bad_samples_are_listed_at_every_world_size(damaged: Dataset, tmp_path: Path) -> None:
    train(damaged, tmp_path / "alone")
    run_workers(train_worker, 2, damaged.store.url, str(tmp_path / "many"), {})
    for out in (tmp_path / "alone", tmp_path / "many"):
        rows = read_metrics(open_store(str(out)))
        assert sum(row["bad_samples"] for row in rows) > len(VICTIMS)  # each in most of 6 epochs
        found = named(out)
        assert sorted(row["sample"] for row in found) == VICTIMS
        assert sorted(row["key"] for row in found) == sorted(damaged.keys(VICTIMS))
        assert all("crc32c" in row["reason"] for row in found)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "alone"), rel=1e-9, abs=0)


def test_too_many_stop_the_run_and_a_higher_limit_lets_it_resume(damaged: Dataset, tmp_path: Path) -> None:
    few = {"data": {"decoder": "cpu", "lanes": 4, "block": 8, "bad_samples": 2}}
    with pytest.raises(UserError, match=r"bad samples, more than the limit of 2: see .*bad-samples\.json"):
        train(damaged, tmp_path / "run", **few)
    before = len(named(tmp_path / "run"))
    assert before > 2
    assert committed_steps(open_store(str(tmp_path / "run"))) == []
    with pytest.raises(UserError, match="more than the limit of 2"):  # the count includes earlier attempts
        train(damaged, tmp_path / "run", **few)
    share = {"data": {"decoder": "cpu", "lanes": 4, "block": 8, "bad_samples": 2, "bad_share": 0.06}}
    run = train(damaged, tmp_path / "run", **share)  # 4 of 70
    assert run.attempt == 3
    assert sorted(row["sample"] for row in named(tmp_path / "run")) == VICTIMS


def test_the_limit_stops_all_ranks(damaged: Dataset, tmp_path: Path) -> None:
    few = {"data": {"decoder": "cpu", "lanes": 4, "block": 8, "bad_samples": 0, "bad_share": 0.0}}
    with pytest.raises(Exception, match="more than the limit of 0"):
        run_workers(train_worker, 2, damaged.store.url, str(tmp_path / "run"), few)
    assert committed_steps(open_store(str(tmp_path / "run"))) == []
