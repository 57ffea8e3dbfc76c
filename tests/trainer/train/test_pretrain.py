"""Promise 4: the global batch never changes. And a run resumes from its newest checkpoint, bit-equal."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.datasets import build_dataset
from tests.support.runs import losses
from tests.support.training.small_runs import (
    SMALL,
    Interrupted,
    config_of,
    interrupt_after,
    request_after,
    spawn,
    train,
    weights,
)
from trainer.group.requests import Request
from trainer.run.checkpoint import committed_steps, newest_checkpoint, steps_to_keep
from trainer.run.metrics import read_metrics
from trainer.run.run import begin_attempt, create_run, make_order, open_run, read_starts
from trainer.run.worker import Callbacks, Worker
from trainer.train.pretrain import pretrain

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    "world_size", [2, 3, *(pytest.param(w, marks=pytest.mark.soak) for w in (4, 5, 6, 7))]
)
def test_world_size_changes_no_loss_and_no_parameter(
    scenes: Dataset, tmp_path: Path, world_size: int
) -> None:
    """30 steps in float64, in micro-batches. 5 and 7 workers share 12 lanes unevenly, and 3 share 4 lanes."""
    data = {**SMALL["data"], "lanes": 4 if world_size == 3 else 12}
    train(scenes, tmp_path / "alone", micro_batch=12, data=data)
    spawn(world_size, scenes.store.url, str(tmp_path / "many"), {"micro_batch": 4, "data": data})
    alone, many = losses(tmp_path / "alone"), losses(tmp_path / "many")
    assert len(alone) == 30
    assert many == pytest.approx(alone, rel=1e-9, abs=0)
    assert alone[-1] < alone[0]
    ours, theirs = weights(tmp_path / "alone"), weights(tmp_path / "many")
    for name, tensor in ours.items():
        assert torch.allclose(theirs[name], tensor, rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("snapshots", [None, pytest.param("/dev/shm", marks=pytest.mark.soak)])
def test_all_ranks_stop_after_the_same_step_and_no_step_is_repeated(
    scenes: Dataset, tmp_path: Path, snapshots: str | None
) -> None:
    """Of three workers, one gets the request after step 10, another later."""
    train(scenes, tmp_path / "alone")
    out, changes = tmp_path / "run", {"checkpoint": {"every_steps": 4, "snapshots": snapshots}}
    spawn(3, scenes.store.url, str(out), changes, Request.SAVE)
    committed = committed_steps(open_store(str(out)))
    assert committed[-1] == 11  # requested before step 11, and counted in it
    run = train(scenes, out, **changes)
    assert read_starts(run.store) == [0, 11]
    assert losses(out) == pytest.approx(losses(tmp_path / "alone"), rel=1e-9, abs=0)
    rows = read_metrics(run.store)
    assert [row["attempt"] for row in rows] == [1] * 11 + [2] * 19
    order = make_order(config_of(), scenes)
    for row in rows[:11]:
        assert sorted(row["sample_ids"]) == sorted(order.step_ids(row["step"], 0, 1).tolist())
    assert not Path(f"/dev/shm/maestream-{tmp_path.name}").exists()


def test_the_loss_of_all_workers_costs_the_steps_since_the_newest_snapshot(
    scenes: Dataset, tmp_path: Path
) -> None:
    train(scenes, tmp_path / "whole")
    out, changes = tmp_path / "run", {"checkpoint": {"snapshots": str(tmp_path)}}
    config, run = open_run(str(out), config_of(**changes), scenes)
    create_run(config, run, scenes)
    with pytest.raises(Interrupted):
        pretrain(config, scenes, run, Worker(), Callbacks(interrupt_after(20)))
    run = train(scenes, out, **changes)
    first, second = read_starts(run.store)
    assert first == 0 < second <= 20
    assert losses(out) == losses(tmp_path / "whole")


def test_a_deleted_run_folder_and_the_same_name_again_start_from_zero(
    scenes: Dataset, tmp_path: Path
) -> None:
    out, changes = tmp_path / "run", {"checkpoint": {"snapshots": str(tmp_path)}}
    config, run = open_run(str(out), config_of(**changes), scenes)
    create_run(config, run, scenes)
    with pytest.raises(Interrupted):
        pretrain(config, scenes, run, Worker(), Callbacks(interrupt_after(7)))
    assert len(list(tmp_path.glob("maestream-*"))) == 1  # a run with the same id would resume from it
    shutil.rmtree(out)
    run = train(scenes, out, **changes)
    assert read_starts(run.store) == [0]
    assert len(losses(out)) == 30


def test_a_stop_request_before_the_last_step_lets_the_run_finish(scenes: Dataset, tmp_path: Path) -> None:
    config, run = open_run(str(tmp_path / "run"), config_of(), scenes)
    create_run(config, run, scenes)
    assert pretrain(config, scenes, run, Worker(), Callbacks(request_after(29, Request.SAVE)))
    assert committed_steps(run.store)[-1] == 30


@pytest.mark.parametrize("stop", [4, 7, 29])
def test_resuming_is_bit_equal_at_any_step(scenes: Dataset, tmp_path: Path, stop: int) -> None:
    changes = {"precision": "float32", "checkpoint": {"every_steps": stop, "keep": 100}}
    train(scenes, tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in committed_steps(open_store(str(tmp_path / "cut"))):
        if step > stop:  # as if it had been killed before the next checkpoint was committed
            (tmp_path / "cut" / "checkpoints" / f"step-{step:08d}" / "COMMITTED").unlink()
    run = train(scenes, tmp_path / "cut", **changes)
    assert run.attempt == 2
    rows = read_metrics(run.store)
    assert [row["step"] for row in rows] == list(range(30))
    assert [row["attempt"] for row in rows] == [1] * stop + [2] * (30 - stop)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_metrics_have_a_row_for_every_step(scenes: Dataset, tmp_path: Path) -> None:
    run = train(scenes, tmp_path / "run")
    rows = read_metrics(run.store)
    assert [row["step"] for row in rows] == list(range(30))
    assert [row["epoch"] for row in rows] == [step // 5 for step in range(30)]
    assert [row["samples"] for row in rows] == [12 * (step + 1) for step in range(30)]
    names = {"attempt", "loss", "lr", "img_per_s", "data_wait_s", "step_s", "world_size", "bad_samples"}
    assert all(names <= row.keys() for row in rows)
    assert rows[5]["lr"] == pytest.approx(0.05 * 12 / 256)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    pictures = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert pictures == ["step-00000000.png", "step-00000030.png"]


def test_the_newest_checkpoints_are_kept(scenes: Dataset, tmp_path: Path) -> None:
    run = train(scenes, tmp_path / "run", checkpoint={"every_steps": 5, "keep": 2})
    assert committed_steps(run.store) == [25, 30]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000025",
        "step-00000030",
    ]


@given(
    steps=st.lists(st.integers(1, 500), unique=True, max_size=40).map(sorted),
    newest=st.integers(1, 4),
    every=st.integers(1, 200),
)
def test_one_checkpoint_of_each_interval_is_kept_for_good(steps: list[int], newest: int, every: int) -> None:
    there: list[int] = []
    for step in steps:
        there = sorted(steps_to_keep([*there, step], newest, every))
    assert set(steps[-newest:]) <= set(there)
    first = {step // every: step for step in reversed(steps) if step >= every}
    assert set(there) == {*steps[-newest:], *first.values()}


def test_a_checkpoint_outside_the_history_is_not_resumed_from(scenes: Dataset, tmp_path: Path) -> None:
    changes = {"checkpoint": {"every_steps": 10}}
    run = train(scenes, tmp_path / "run", **changes)
    begin_attempt(run, Worker(), 20)  # it had read the run folder before step 30 was committed
    assert newest_checkpoint(run.store) == 20
    assert committed_steps(run.store) == [10, 20]
    train(scenes, tmp_path / "run", **changes)
    assert read_starts(run.store) == [0, 20, 20]


def test_incomplete_checkpoints_are_removed_with_the_next(scenes: Dataset, tmp_path: Path) -> None:
    changes = {"checkpoint": {"every_steps": 5, "keep": 2}}
    run = train(scenes, tmp_path / "run", **changes)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000030" / "COMMITTED").unlink()
    (folder / "step-00000007").mkdir()
    (folder / "step-00000007" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(folder / "step-00000025", folder / "step-00000025.bak")  # a user's copy
    assert committed_steps(run.store) == [25]
    train(scenes, tmp_path / "run", **changes)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-00000025",
        "step-00000025.bak",
        "step-00000030",
    ]


def test_a_finished_run_does_not_train_again(scenes: Dataset, tmp_path: Path) -> None:
    train(scenes, tmp_path / "run")
    before = weights(tmp_path / "run")
    run = train(scenes, tmp_path / "run")
    assert len(read_metrics(run.store)) == 30
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())


def test_a_loss_that_is_not_finite_stops_before_anything_is_written(scenes: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+.*lower optim\.blr"):
        train(
            scenes,
            tmp_path / "run",
            precision="float32",
            optim={"blr": 1e30, "warmup_epochs": 0},
            checkpoint={"every_steps": 4},
        )
    store = open_store(str(tmp_path / "run"))
    assert committed_steps(store) == []
    assert all(math.isfinite(row["loss"]) for row in read_metrics(store))


def test_weights_that_are_not_finite_are_never_committed(scenes: Dataset, tmp_path: Path) -> None:
    """The loss of a step may be finite although its update makes weights infinite."""
    with pytest.raises(UserError, match="after step 1 the weights are not finite"):
        train(
            scenes,
            tmp_path / "run",
            precision="float32",
            optim={"blr": 1e45, "warmup_epochs": 0},
            checkpoint={"every_steps": 1},
        )
    assert committed_steps(open_store(str(tmp_path / "run"))) == []
    assert not (tmp_path / "run" / "pictures" / "step-00000001.png").exists()


def test_refused_changes_of_a_run(scenes: Dataset, tmp_path: Path) -> None:
    from tests.support.datasets import build_dataset

    train(scenes, tmp_path / "run", epochs=1)
    other = build_dataset("synthetic:?count=70&classes=7&seed=5", str(tmp_path / "other"))
    for changes, message in [
        ({"epochs": 2}, "epochs: 1.0 → 2.0"),
        ({"epochs": 1, "global_batch": 6}, "global_batch: 12 → 6"),
        ({"epochs": 1, "seed": 3}, "seed: 0 → 3"),
        ({"epochs": 1, "data": {**SMALL["data"], "block": 9}}, "data.block: 8 → 9"),
        ({"epochs": 1, "workers": 5}, "use at most 4 workers"),
    ]:
        with pytest.raises(UserError, match=message):
            open_run(str(tmp_path / "run"), config_of(**changes), scenes)
    with pytest.raises(UserError, match="started with another dataset"):
        open_run(str(tmp_path / "run"), config_of(epochs=1), other)
    with pytest.raises(UserError, match="not empty and not a run"):
        open_run(scenes.store.url, config_of(), scenes)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000005"
    state = (checkpoint / "state.json").read_text()
    (checkpoint / "state.json").write_text(state.replace(scenes.fingerprint, "0" * 64))
    with pytest.raises(UserError, match="was not written by this run"):
        train(scenes, tmp_path / "run", epochs=1)
    (checkpoint / "state.json").write_text(state.replace('"block": 8', '"block": 9'))
    with pytest.raises(UserError, match=r"data\.block: 9 → 8"):
        train(scenes, tmp_path / "run", epochs=1)
    (checkpoint / "state.json").write_text(state[:100])
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        train(scenes, tmp_path / "run", epochs=1)
    (checkpoint / "state.json").write_text(state)
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is damaged"):
        train(scenes, tmp_path / "run", epochs=1)


def test_knn_evaluation_during_training(scenes: Dataset, tmp_path: Path) -> None:
    knn = {"val": scenes.store.url, "every": 1.0, "known": 70, "asked": 20}
    train(scenes, tmp_path / "run", epochs=2.0, knn=knn)
    train(scenes, tmp_path / "plain", epochs=2.0)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")  # the evaluation does not change training
    last = read_metrics(open_store(str(tmp_path / "run")))[-1]
    assert last["knn_step"] == 10
    assert last["knn_top1"] > 50  # each image is its own nearest neighbour


def test_a_failed_knn_evaluation_stops_the_run(scenes: Dataset, tmp_path: Path) -> None:
    other = build_dataset("synthetic:?count=20&classes=3", str(tmp_path / "other"))
    with pytest.raises(UserError, match="have different classes"):
        train(scenes, tmp_path / "run", knn={"val": other.store.url})


@pytest.mark.parametrize(
    "changes",
    [
        {"jitter": 0.4},
        {"data": {**SMALL["data"], "crops": "fixed"}},
        {"data": {**SMALL["data"], "crops": "centre", "flips": False}},
        *({"model": {**SMALL["model"], "masked": masked}} for masked in ("token", "noise")),
        *({"model": {**SMALL["model"], "sampling": sampling}} for sampling in ("block", "grid")),
    ],
    ids=str,
)
def test_models_of_the_studies_train(changes: dict[str, Any], scenes: Dataset, tmp_path: Path) -> None:
    train(scenes, tmp_path / "run", epochs=4.0, **changes)
    found = losses(tmp_path / "run")
    assert len(found) == 20
    assert sum(found[-5:]) < sum(found[:5])
