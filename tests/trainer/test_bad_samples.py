"""Promise 5: a bad byte never stops a run by itself, and never hides; too many of them stop it."""

import json
import shutil
from pathlib import Path

import pytest
from gloo import run_workers
from test_pretrain import _worker, committed_steps, losses, train

from pipeline.errors import UserError
from pipeline.manifest import Dataset, open_dataset
from pipeline.storage import open_store
from trainer.metrics import read_metrics

VICTIMS = [3, 20, 41, 55]


@pytest.fixture(scope="module")
def damaged(scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The scenes with a byte changed in each of four images."""
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


def test_bad_samples_are_counted_and_named_at_every_world_size(damaged: Dataset, tmp_path: Path) -> None:
    train(damaged, tmp_path / "alone")
    run_workers(_worker, 2, damaged.store.url, str(tmp_path / "many"), {})
    for out in (tmp_path / "alone", tmp_path / "many"):
        rows = read_metrics(open_store(str(out)))
        assert sum(row["bad_samples"] for row in rows) > len(VICTIMS)  # each in most of 6 epochs
        found = named(out)
        assert sorted(row["sample"] for row in found) == VICTIMS
        assert sorted(row["key"] for row in found) == sorted(damaged.keys(VICTIMS))
        assert all("crc32c" in row["reason"] for row in found)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "alone"), rel=1e-9, abs=0)


def test_more_than_the_cap_stop_the_run_and_a_higher_cap_lets_it_go_on(
    damaged: Dataset, tmp_path: Path
) -> None:
    few = {"data": {"decoder": "cpu", "lanes": 4, "block": 8, "bad_samples": 2}}
    with pytest.raises(
        UserError, match=r"bad samples, more than the 2 that are allowed: .*bad-samples\.json"
    ):
        train(damaged, tmp_path / "run", **few)
    before = len(named(tmp_path / "run"))
    assert before > 2
    assert committed_steps(open_store(str(tmp_path / "run"))) == []
    with pytest.raises(UserError, match="more than the 2"):  # the count outlives the attempt
        train(damaged, tmp_path / "run", **few)
    share = {"data": {"decoder": "cpu", "lanes": 4, "block": 8, "bad_samples": 2, "bad_share": 0.06}}
    run = train(damaged, tmp_path / "run", **share)  # 4 of 70
    assert run.attempt == 3
    assert sorted(row["sample"] for row in named(tmp_path / "run")) == VICTIMS


def test_the_cap_stops_all_ranks(damaged: Dataset, tmp_path: Path) -> None:
    few = {"data": {"decoder": "cpu", "lanes": 4, "block": 8, "bad_samples": 0, "bad_share": 0.0}}
    with pytest.raises(Exception, match="more than the 0 that are allowed"):
        run_workers(_worker, 2, damaged.store.url, str(tmp_path / "run"), few)
    assert committed_steps(open_store(str(tmp_path / "run"))) == []
