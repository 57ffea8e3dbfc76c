"""`maestream checkpoints`: all checkpoints are listed, and only those that the retention rule does not keep are removed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.checkpoints import RetentionRule, list_checkpoints, print_table
from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from pipeline.storage.store import Store, open_store
from tests.support.command_line import maestream, printed, refused
from trainer.config.recipe import parse_config
from trainer.config.schema import PretrainConfig
from trainer.run import checkpoint, lease
from trainer.run.checkpoint import (
    FOLDER,
    MARKER,
    committed_steps,
    newest_checkpoint,
    remove_checkpoints,
    step_of,
)
from trainer.run.metrics import METRICS, read_metrics
from trainer.run.run import LEASE, RUN, create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.train.pretrain import pretrain

pytestmark = pytest.mark.integration

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
    """A run with a checkpoint every three steps, and an incomplete one of an attempt that died while writing it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    knn = {"val": scenes.store.url, "every": 3.0, "known": 20, "asked": 10}  # evaluates steps 15 and 20
    config = parse_config(PretrainConfig, {**CONFIG, "knn": knn}, "test")
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep": 99})})
    config, run = open_run(str(out), config, scenes)
    create_run(config, run, scenes)
    pretrain(config, scenes, run, Worker(), Callbacks())
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("keep: 99", "keep: 3"))
    (out / UNFINISHED).parent.mkdir()
    (out / UNFINISHED).write_bytes(bytes(1000))
    return out


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, trained: Path, tmp_path: Path) -> Store:
    """A copy of the run, in a local folder and in a bucket."""
    if request.param == "folder":
        return open_store(str(shutil.copytree(trained, tmp_path / "run")))
    store = open_store(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    for name in open_store(str(trained)).names():
        if not name.startswith(("tensorboard", "pictures")):
            store.write(name.replace(METRICS, "metrics/0001-00000020.jsonl"), (trained / name).read_bytes())
    return store


def existing_steps(store: Store) -> set[int]:
    """Steps of all checkpoints that have files, complete or not."""
    return {step for name in store.names(FOLDER) if (step := step_of(name)) is not None}


def rows(out: str) -> dict[str, list[str]]:
    """The rows of the printed table, by step."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    return {row[0]: row[1:] for row in cells if row[0].isdigit()}


def test_all_checkpoints_are_listed(store: Store) -> None:
    out = printed("checkpoints", store.url)
    table = rows(out)
    assert {int(step) for step in table} == ALL
    metrics = {row["step"] + 1: row for row in read_metrics(store)}
    epoch, size, written, loss, knn, state, kept = table["15"]
    assert (epoch, state, kept) == ("3.0", "complete", "newest")
    folder = open_store(store.describe(f"{FOLDER}/step-00000015"))
    assert size == f"{sum(folder.sizes().values()) / 1e6:.2f} MB"
    assert written.startswith("20")
    assert loss == f"{metrics[15]['loss']:.4f}"
    knn_top1 = {row["knn_step"]: row["knn_top1"] for row in metrics.values() if "knn_top1" in row}
    assert knn == f"{knn_top1[15]:.2f}"
    assert table["12"][-3:] == ["–", "complete", "always"]  # no k-NN evaluation at this step
    assert [step for step, row in table.items() if row[-1] == "always"] == ["6", "12"]
    assert [step for step, row in table.items() if row[-1] == "newest"] == ["15", "18", "20"]
    assert table["19"][-2:] == ["incomplete", "–"]
    assert "the rule keeps the newest 3 checkpoints, and the first of every 5 steps permanently" in out
    assert existing_steps(store) == ALL


def test_prune_lists_and_removes_only_with_yes(store: Store) -> None:
    out = printed("checkpoints", store.url, "--keep", 2, "--keep-every", 10, "--prune")
    assert "5 checkpoints to remove" in out
    assert "steps 3, 6, 9, 15, 19. Add --yes to remove" in out
    assert existing_steps(store) == ALL
    out = printed("checkpoints", store.url, "--keep", 2, "--keep-every", 10, "--prune", "--yes")
    assert "removed 5 checkpoints" in out
    assert existing_steps(store) == {12, 18, 20} == set(committed_steps(store))
    assert not store.exists(LEASE)
    out = printed("checkpoints", store.url, "--keep", 1, "--keep-every", 0, "--prune", "--yes")
    assert existing_steps(store) == {20}  # the newest checkpoint is always kept
    assert newest_checkpoint(store) == 20
    assert "nothing to remove" in printed("checkpoints", store.url, "--keep", 1, "--prune", "--yes")


def test_the_default_rule_is_that_of_the_run(store: Store) -> None:
    printed("checkpoints", store.url, "--prune", "--yes")
    assert existing_steps(store) == {6, 12, 15, 18, 20}


def test_a_superseded_checkpoint_does_not_count_as_newest(store: Store) -> None:
    known = json.loads(store.read(RUN))
    store.write(RUN, json.dumps(known | {"starts": [0, 12]}).encode())  # 15, 18, 20 are of the first attempt
    assert rows(printed("checkpoints", store.url))["15"][-2:] == ["superseded", "–"]
    printed("checkpoints", store.url, "--keep", 1, "--keep-every", 0, "--prune", "--yes")
    assert existing_steps(store) == {12}
    assert newest_checkpoint(store) == 12


def test_a_damaged_checkpoint_is_kept_and_does_not_count_as_newest(store: Store) -> None:
    store.write(f"{FOLDER}/step-00000020/state.json", b"{")
    assert rows(printed("checkpoints", store.url))["20"][-2:] == ["damaged", "yes"]
    printed("checkpoints", store.url, "--keep", 1, "--keep-every", 0, "--prune", "--yes")
    assert existing_steps(store) == {18, 20}


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_removal_leaves_no_checkpoint_that_looks_complete(
    done: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever files were already removed."""
    all_files = {name for name in store.names(FOLDER) if step_of(name) == 9}
    remove = store.fs.rm_file
    remaining = iter(range(done))

    def cut_short(path: str) -> None:
        if not path.endswith(MARKER) and next(remaining, None) is None:
            raise PermissionError("cut short")
        remove(path)

    monkeypatch.setattr(store.fs, "rm_file", cut_short)
    with pytest.raises(UserError, match="cut short"):
        remove_checkpoints(store, [6, 9])
    assert all_files - set(store.names(FOLDER))
    assert {6, 9}.isdisjoint(committed_steps(store))
    assert {6, 9} & existing_steps(store)
    monkeypatch.undo()
    printed("checkpoints", store.url, "--prune", "--yes")
    assert {6, 9}.isdisjoint(existing_steps(store))


def test_nothing_is_removed_from_a_training_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    with lease.Lease(store, print, lambda: None):
        message = refused("checkpoints", store.url, "--prune", "--yes")
        assert "is owned by process" in message
        assert "stop it first" in message
        assert "15" in rows(printed("checkpoints", store.url, "--prune"))
    assert existing_steps(store) == ALL


def test_removal_stops_when_another_process_takes_the_run_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(store: Store, steps: list[int]) -> None:
        remove_checkpoints(store, steps)
        store.write(LEASE, json.dumps({"owner": "another", "beat": 0}).encode())

    monkeypatch.setattr(lease, "BEAT_S", 60)  # no heartbeat meanwhile, which would take the run back
    monkeypatch.setattr(checkpoint, "remove_checkpoints", lose)
    assert "another process has taken over" in refused(
        "checkpoints", store.url, "--keep", 1, "--prune", "--yes"
    )
    assert existing_steps(store) == ALL - {3}


def test_runs_without_checkpoints_and_invalid_options(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert "--yes confirms --prune" in refused("checkpoints", run, "--yes")
    assert "is not a run" in refused("checkpoints", tmp_path)
    shutil.rmtree(run / FOLDER)
    assert "has no checkpoints yet" in printed("checkpoints", run)
    assert "nothing to remove" in printed("checkpoints", run, "--prune")
    (run / RUN).unlink()
    assert "has not started" in refused("checkpoints", run)
    assert maestream("checkpoints", tmp_path, "--keep", 0, check=False).returncode == 2


def test_a_checkpoint_that_is_removed_while_listing_is_still_a_row(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(trained))
    rule = RetentionRule(keep=1, every=None)

    def gone(*_: Any) -> float:
        raise FileNotFoundError

    monkeypatch.setattr(Store, "modified", gone)
    print_table(store, list_checkpoints(store, rule), rule)
    assert "the rule keeps the newest checkpoint" in capsys.readouterr().out
