"""Promise 3: which steps are in a run's history."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainer.run
from pipeline.errors import UserError
from pipeline.storage import open_store
from trainer.run import RUN, Run, begin_attempt, check_newest, in_history, read_known


@given(st.data())
def test_each_step_is_in_the_history_once(data: st.DataObject) -> None:
    """Attempts begin at any step that the history has reached, and do any number of steps."""
    starts, trained, reached = [], [], 0
    for attempt in range(1, data.draw(st.integers(1, 8)) + 1):
        start = data.draw(st.integers(0, reached))
        steps = data.draw(st.integers(0, 20))
        starts.append(start)
        trained += [(attempt, step) for step in range(start, start + steps)]
        reached = start + steps
    history = [step for attempt, step in trained if in_history(starts, attempt, step)]
    assert sorted(history) == list(range(reached))
    # of a step that was done again it is the last attempt's
    last = dict(reversed([(step, attempt) for attempt, step in reversed(trained)]))
    for attempt, step in trained:
        if in_history(starts, attempt, step):
            assert last[step] == attempt


def test_an_older_attempt_is_refused(tmp_path: Path) -> None:
    run = Run(open_store(str(tmp_path)), "a", 0)
    run.store.write(RUN, json.dumps({"run_id": "a", "fingerprint": "f", "starts": []}).encode())
    first = begin_attempt(run, 0)
    check_newest(first)
    second = begin_attempt(run, 10)
    assert (first.attempt, second.attempt) == (1, 2)
    check_newest(second)
    with pytest.raises(UserError, match=r"attempt 2 of .* has taken over from attempt 1"):
        check_newest(first)


def test_versions_are_kept_where_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(open_store(str(tmp_path)), "a", 0)
    older = {"run_id": "a", "fingerprint": "f", "starts": [0, 5]}  # a run of when they were not kept
    run.store.write(RUN, json.dumps(older).encode())
    for step, number in ((7, "2.13"), (8, "2.13"), (9, "2.14"), (9, "2.13")):
        monkeypatch.setattr(trainer.run, "version", lambda name, number=number: number)
        begin_attempt(run, step)
    known = read_known(run.store)
    assert known.starts == [0, 5, 7, 8, 9, 9]
    assert {attempt: said["torch"] for attempt, said in known.versions.items()} == {
        3: "2.13",
        5: "2.14",
        6: "2.13",
    }
    assert {"python", "maestream", "torch", "ray"} <= known.versions[3].keys()
