"""`maestream checkpoints`: what there is to go on from is told, and only what a rule leaves out is ever removed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import maestream, printed, refused

from cluster.checkpoints import Rule, find, show
from pipeline.errors import UserError
from pipeline.manifest import Dataset
from pipeline.storage import Store, open_store
from trainer import checkpoint, lease
from trainer.checkpoint import FOLDER, MARKER, committed_steps, newest_commit, remove_checkpoints, step_of
from trainer.config import PretrainConfig
from trainer.metrics import METRICS, read_metrics
from trainer.pretrain import pretrain
from trainer.recipe import parse_config
from trainer.run import LEASE, RUN, found_run, open_run

CONFIG: dict[str, Any] = {
    "global_batch": 12,
    "epochs": 4.0,  # of 5 steps
    "micro_batch": 12,
    "model": {
        "image_size": 32, "patch_size": 8, "width": 24, "depth": 1, "heads": 3,
        "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2,
    },
    "optim": {"blr": 0.05, "warmup_epochs": 1},
    "data": {"decoder": "cpu", "lanes": 4, "block": 8, "threads": 1},
    "checkpoint": {"every_steps": 3, "keep": 3, "keep_every": 5, "snapshots": None},
}  # fmt: skip
UNFINISHED = f"{FOLDER}/step-00000019/model.safetensors"
ALL = {3, 6, 9, 12, 15, 18, 19, 20}


@pytest.fixture(scope="module")
def trained(scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a commit each three steps, and one of an attempt that died while it wrote it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    knn = {"val": scenes.store.url, "every": 3.0, "known": 20, "asked": 10}  # it is of steps 15 and 20
    config = parse_config(PretrainConfig, {**CONFIG, "knn": knn}, "test")
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep": 99})})
    config, run = open_run(str(out), config, scenes)
    found_run(config, run, scenes)
    pretrain(config, scenes, run)
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("keep: 99", "keep: 3"))
    (out / UNFINISHED).parent.mkdir()
    (out / UNFINISHED).write_bytes(bytes(1000))
    return out


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, trained: Path, tmp_path: Path) -> Store:
    """A copy of that run."""
    if request.param == "folder":
        return open_store(str(shutil.copytree(trained, tmp_path / "run")))
    store = open_store(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    for name in open_store(str(trained)).names():
        if not name.startswith(("tensorboard", "pictures")):
            store.write(name.replace(METRICS, "metrics/0001-00000020.jsonl"), (trained / name).read_bytes())
    return store


def there(store: Store) -> set[int]:
    """Steps of all that lies there, whole or not."""
    return {step for name in store.names(FOLDER) if (step := step_of(name)) is not None}


def rows(told: str) -> dict[str, list[str]]:
    """Of the table, by step."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in told.splitlines()]
    return {row[0]: row[1:] for row in cells if row[0].isdigit()}


def test_all_that_lies_there_is_told(store: Store) -> None:
    told = printed("checkpoints", store.url)
    table = rows(told)
    assert {int(step) for step in table} == ALL
    metrics = {row["step"] + 1: row for row in read_metrics(store)}
    epoch, size, written, loss, knn, committed, stays = table["15"]
    assert (epoch, committed, stays) == ("3.0", "yes", "newest")
    folder = open_store(store.describe(f"{FOLDER}/step-00000015"))
    assert size == f"{sum(folder.sizes().values()) / 1e6:.2f} MB"
    assert written.startswith("20")
    assert loss == f"{metrics[15]['loss']:.4f}"
    judged = {row["knn_step"]: row["knn_top1"] for row in metrics.values() if "knn_top1" in row}
    assert knn == f"{judged[15]:.2f}"
    assert table["12"][-3:] == ["–", "yes", "for good"]  # nobody asked its neighbours
    assert [step for step, row in table.items() if row[-1] == "for good"] == ["6", "12"]
    assert [step for step, row in table.items() if row[-1] == "newest"] == ["15", "18", "20"]
    assert table["19"][-2:] == ["no", "–"]
    assert "what stays is the newest 3, and the first of each 5 steps for good" in told
    assert there(store) == ALL


def test_a_rule_says_first_and_removes_when_told(store: Store) -> None:
    told = printed("checkpoints", store.url, "--keep", 2, "--keep-every", 10, "--prune")
    assert "--yes would remove 5 checkpoints" in told
    assert "of step 3, 6, 9, 15, 19" in told
    assert there(store) == ALL
    told = printed("checkpoints", store.url, "--keep", 2, "--keep-every", 10, "--prune", "--yes")
    assert "5 checkpoints are removed" in told
    assert there(store) == {12, 18, 20} == set(committed_steps(store))
    assert not store.exists(LEASE)
    told = printed("checkpoints", store.url, "--keep", 1, "--keep-every", 0, "--prune", "--yes")
    assert there(store) == {20}  # the newest commit always stays
    assert newest_commit(store) == 20
    assert "nothing to remove" in printed("checkpoints", store.url, "--keep", 1, "--prune", "--yes")


def test_without_a_rule_it_is_the_run_s_own(store: Store) -> None:
    printed("checkpoints", store.url, "--prune", "--yes")
    assert there(store) == {6, 12, 15, 18, 20}


def test_what_the_run_would_not_go_on_from_does_not_count_as_its_newest(store: Store) -> None:
    known = json.loads(store.read(RUN))
    store.write(RUN, json.dumps(known | {"starts": [0, 12]}).encode())  # 15, 18, 20 are of the attempt before
    assert rows(printed("checkpoints", store.url))["15"][-2:] == ["taken over", "–"]
    printed("checkpoints", store.url, "--keep", 1, "--keep-every", 0, "--prune", "--yes")
    assert there(store) == {12}
    assert newest_commit(store) == 12


def test_a_damaged_one_is_left_to_a_person_and_does_not_count(store: Store) -> None:
    store.write(f"{FOLDER}/step-00000020/state.json", b"{")
    assert rows(printed("checkpoints", store.url))["20"][-2:] == ["damaged", "as it is"]
    printed("checkpoints", store.url, "--keep", 1, "--keep-every", 0, "--prune", "--yes")
    assert there(store) == {18, 20}


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_removal_leaves_nothing_that_looks_committed(
    done: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever files were removed by then, of many at once."""
    whole = {name for name in store.names(FOLDER) if step_of(name) == 9}
    remove = store.fs.rm_file
    left = iter(range(done))

    def cut_short(path: str) -> None:
        if not path.endswith(MARKER) and next(left, None) is None:
            raise PermissionError("cut short")
        remove(path)

    monkeypatch.setattr(store.fs, "rm_file", cut_short)
    with pytest.raises(UserError, match="cut short"):
        remove_checkpoints(store, [6, 9])
    assert whole - set(store.names(FOLDER))
    assert {6, 9}.isdisjoint(committed_steps(store))
    assert {6, 9} & there(store)
    monkeypatch.undo()
    printed("checkpoints", store.url, "--prune", "--yes")
    assert {6, 9}.isdisjoint(there(store))


def test_a_run_that_is_going_on_is_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    with lease.Lease(store, print, lambda: None):
        told = refused("checkpoints", store.url, "--prune", "--yes")
        assert "is owned by process" in told
        assert "stop that one first" in told
        assert "15" in rows(printed("checkpoints", store.url, "--prune"))
    assert there(store) == ALL


def test_who_loses_the_run_removes_nothing_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(store: Store, steps: list[int]) -> None:
        remove_checkpoints(store, steps)
        store.write(LEASE, json.dumps({"owner": "another", "beat": 0}).encode())

    monkeypatch.setattr(lease, "BEAT_S", 60)  # none comes between, and takes the run back
    monkeypatch.setattr(checkpoint, "remove_checkpoints", lose)
    assert "somebody else has taken" in refused("checkpoints", store.url, "--keep", 1, "--prune", "--yes")
    assert there(store) == ALL - {3}


def test_what_has_none_and_what_is_wrong(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert "--prune may remove something" in refused("checkpoints", run, "--yes")
    assert "is not a run" in refused("checkpoints", tmp_path)
    shutil.rmtree(run / FOLDER)
    assert "has no checkpoint yet" in printed("checkpoints", run)
    assert "nothing to remove" in printed("checkpoints", run, "--prune")
    (run / RUN).unlink()
    assert "has not begun" in refused("checkpoints", run)
    assert maestream("checkpoints", tmp_path, "--keep", 0, check=False).returncode == 2


def test_a_commit_that_a_run_removes_meanwhile_is_still_a_row(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(trained))
    rule = Rule(keep=1, every=None)

    def gone(*_: Any) -> float:
        raise FileNotFoundError

    monkeypatch.setattr(Store, "modified", gone)
    show(store, find(store, rule), rule)
    assert "what stays is the newest 1" in capsys.readouterr().out
