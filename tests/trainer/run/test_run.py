"""Promise 3: which steps are in a run's history."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainer.run.run
from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.training.small_runs import config_of
from trainer.run.run import (
    RUN,
    Run,
    begin_attempt,
    check_newest,
    create_run,
    in_history,
    open_run,
    read_config,
    read_record,
    write_failure,
)
from trainer.run.worker import Worker


@given(st.data())
def test_each_step_is_in_the_history_once(data: st.DataObject) -> None:
    """Attempts begin at any step that the history has reached, and train any number of steps."""
    starts, trained, reached = [], [], 0
    for attempt in range(1, data.draw(st.integers(1, 8)) + 1):
        start = data.draw(st.integers(0, reached))
        steps = data.draw(st.integers(0, 20))
        starts.append(start)
        trained += [(attempt, step) for step in range(start, start + steps)]
        reached = start + steps
    history = [step for attempt, step in trained if in_history(starts, attempt, step)]
    assert sorted(history) == list(range(reached))
    # A repeated step counts for the last attempt that trained it.
    last = dict(reversed([(step, attempt) for attempt, step in reversed(trained)]))
    for attempt, step in trained:
        if in_history(starts, attempt, step):
            assert last[step] == attempt


def test_an_older_attempt_is_refused(tmp_path: Path) -> None:
    run = Run(open_store(str(tmp_path)), "a", 0)
    run.store.write(RUN, json.dumps({"run_id": "a", "fingerprint": "f", "starts": []}).encode())
    first = begin_attempt(run, Worker(), 0)
    check_newest(first)
    second = begin_attempt(run, Worker(), 10)
    assert (first.attempt, second.attempt) == (1, 2)
    check_newest(second)
    with pytest.raises(UserError, match=r"attempt 2 of .* has taken over from attempt 1"):
        check_newest(first)


def test_versions_are_recorded_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(open_store(str(tmp_path)), "a", 0)
    older = {
        "run_id": "a",
        "fingerprint": "f",
        "starts": [0, 5],
    }  # a run of a version that did not record versions
    run.store.write(RUN, json.dumps(older).encode())
    for step, number in ((7, "2.13"), (8, "2.13"), (9, "2.14"), (9, "2.13")):
        monkeypatch.setattr(trainer.run.run, "version", lambda name, number=number: number)
        begin_attempt(run, Worker(), step)
    known = read_record(run.store)
    assert known.starts == [0, 5, 7, 8, 9, 9]
    assert {attempt: found["torch"] for attempt, found in known.versions.items()} == {
        3: "2.13",
        5: "2.14",
        6: "2.13",
    }
    assert {"python", "maestream", "torch", "ray"} <= known.versions[3].keys()


def test_a_run_that_failed_before_training_may_start_again_with_another_config(
    scenes: Dataset, tmp_path: Path
) -> None:
    url = str(tmp_path / "run")
    config, first = open_run(url, config_of(epochs=1), scenes)
    create_run(config, first, scenes)
    begin_attempt(first, Worker(), 0)
    assert open_run(url, config_of(epochs=1), scenes)[1].attempt == 2  # the same config: the same run
    with pytest.raises(
        UserError, match="another config"
    ):  # it may have been killed, with snapshots in memory
        open_run(url, config_of(epochs=2), scenes)
    write_failure(first, "the weights do not fit the model")
    config, second = open_run(url, config_of(epochs=2), scenes)
    assert second.attempt == 1
    assert second.run_id != first.run_id
    create_run(config, second, scenes)
    assert read_config(second.store) == config
    assert read_record(second.store).starts == []


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "metrics/0001-00000010.jsonl", "checkpoints/step-00000010/COMMITTED"]
)
def test_a_run_that_has_trained_keeps_its_config(name: str, scenes: Dataset, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    config, run = open_run(url, config_of(epochs=1), scenes)
    create_run(config, run, scenes)
    run.store.write(name, b"")
    write_failure(run, "too many bad samples")
    with pytest.raises(UserError, match=r"another config \(epochs: 1.0 → 2.0\)"):
        open_run(url, config_of(epochs=2), scenes)


def test_a_run_that_resumed_from_a_snapshot_keeps_its_config(scenes: Dataset, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    config, run = open_run(url, config_of(epochs=1), scenes)
    create_run(config, run, scenes)
    begin_attempt(run, Worker(), 3)
    write_failure(run, "too many bad samples")
    with pytest.raises(UserError, match="another config"):
        open_run(url, config_of(epochs=2), scenes)
