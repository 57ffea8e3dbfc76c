"""After a kill at any byte and a resume, each line of each .jsonl file is one JSON object; nothing is lost or repeated."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.run.metrics
from pipeline.storage.store import Store, open_store
from trainer.run import json_lines
from trainer.run.events import EVENTS, Events, read_events
from trainer.run.json_lines import append_lines, newest_lines, read_lines, repair_lines, to_line
from trainer.run.metrics import METRICS, Metrics, read_metrics
from trainer.run.run import RUN, Run

VALUES = st.recursive(
    st.none()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('{}[]\n\\"aé\u2028'),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("k"), inner, max_size=1),
    max_leaves=3,
)
OBJECTS = st.lists(st.dictionaries(st.sampled_from("ab"), VALUES, min_size=1, max_size=2), max_size=4)
DAMAGE = st.lists(
    st.sampled_from(
        [
            b"",
            b"\0\0\0",
            b'{"loss": 0.1',
            b'"step": 3}',
            b"[1, 2]",
            b"{}{}",
            b"\xff{}",
            b'{"a": "}',
            b'{"a": "}", "b": {}',
            b'{"a": ["}", {}',
        ]
    )
)


def parsed(path: Path) -> list[dict[str, Any]]:
    """The lines of a file as a strict reader takes them: each must be one object, and end."""
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    values = [json.loads(line, parse_constant=pytest.fail) for line in data.splitlines()]
    assert all(isinstance(value, dict) for value in values)
    return values


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(max_examples=60)
@given(OBJECTS, OBJECTS, st.data(), st.booleans())
def test_a_file_cut_at_any_byte_is_continued(
    folder: Path,
    first: list[dict[str, Any]],
    second: list[dict[str, Any]],
    data: st.DataObject,
    resumed: bool,
) -> None:
    path = folder / "cut.jsonl"
    path.unlink(missing_ok=True)
    append_lines(path, first)
    whole = path.read_bytes() if first else b""
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    ends = [len(b"".join(map(to_line, first[: n + 1]))) for n in range(len(first))]
    kept = [value for value, end in zip(first, ends, strict=True) if end - 1 <= cut]  # 1: its end of line
    if resumed:
        repair_lines(path)
        assert parsed(path) == kept
    append_lines(path, second)
    if resumed or second:
        assert parsed(path) == kept + second
    assert list(read_lines(open_store(str(folder)), path.name)) == kept + second
    assert list(newest_lines(path)) == (kept + second)[::-1]


@settings(max_examples=40)
@given(OBJECTS, DAMAGE, st.randoms(use_true_random=False))
def test_lines_that_older_versions_left_incomplete_are_removed(
    folder: Path, values: list[dict[str, Any]], damage: list[bytes], rng: Any
) -> None:
    lines = [*map(to_line, values), *(line + b"\n" for line in damage)]
    order = rng.sample(range(len(lines)), len(lines))
    path = folder / "older.jsonl"
    path.write_bytes(b"".join(lines[i] for i in order))
    repair_lines(path)
    assert parsed(path) == [values[i] for i in order if i < len(values)]


def test_a_whole_file_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "whole.jsonl"
    append_lines(path, [{"text": "a } b"}, {"step": 1}])
    before = path.stat()
    repair_lines(path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_file_is_read_from_its_end_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.jsonl"
    values = [{"step": step, "text": "x" * (step % 7)} for step in range(40)]
    append_lines(path, values)
    for size in (1, 2, 13, 64, 10_000):
        monkeypatch.setattr(json_lines, "BLOCK", size)
        assert list(newest_lines(path)) == values[::-1]


def test_numbers_that_json_does_not_have_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    bad = [float("nan"), float("inf"), -float("inf")]
    append_lines(path, [{"loss": 0.5, "r2": bad[0], "time": {"a": bad[1], "b": 0.1}, "list": [1.0, *bad]}])
    assert parsed(path) == [{"loss": 0.5, "time": {"b": 0.1}, "list": [1.0, None, None, None]}]


def row(attempt: int, step: int) -> dict[str, Any]:
    return {"attempt": attempt, "step": step, "loss": 0, "time": {}}


def attempt_of(store: Store, starts: list[int]) -> Run:
    store.write(RUN, json.dumps({"run_id": "a", "fingerprint": "f", "starts": starts}).encode())
    return Run(store, "a", len(starts), owner="me")


def test_a_run_killed_at_any_byte_of_its_metrics_and_events_resumes_with_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local folder. The snapshot that the second attempt starts from has the rows of steps 2 to 4."""
    monkeypatch.setattr(trainer.run.metrics, "SummaryWriter", mock.Mock())  # it starts threads
    rows = [row(1, step) for step in range(6)]
    first = attempt_of(open_store(str(tmp_path / "first")), [0])
    metrics, events = Metrics(first), Events(first)
    for number, one in enumerate(rows):
        metrics.write([one])
        events.append({"event": "step", "time": float(number)})
    metrics.close(6)
    written = {name: (tmp_path / "first" / name).read_bytes() for name in (METRICS, EVENTS)}
    for cut in range(len(written[METRICS]) + 1):
        out = tmp_path / "cut"
        store = open_store(str(out))
        for name, data in written.items():
            out.mkdir(exist_ok=True)
            (out / name).write_bytes(data[:cut])
        second = attempt_of(store, [0, 5])
        metrics, events = Metrics(second), Events(second)
        metrics.restore(rows[2:5])
        metrics.write([row(2, 5)])
        metrics.tensorboard.close()
        events.append({"event": "attempt", "time": 10.0})
        found = [(r["attempt"], r["step"]) for r in parsed(out / METRICS)]
        kept = sum(r in parsed(out / METRICS) for r in rows)
        assert len(found) == len(set(found))  # nothing twice
        assert kept >= max(written[METRICS][:cut].count(b"\n"), 3)  # nothing whole is lost
        assert found[-1] == (2, 5)
        assert {step for _, step in found} >= {2, 3, 4, 5}
        assert [r["step"] for r in read_metrics(store)][-4:] == [2, 3, 4, 5]
        assert parsed(out / EVENTS) == read_events(store)
        assert len(parsed(out / EVENTS)) >= written[EVENTS][:cut].count(b"\n") + 1
        shutil.rmtree(out)


def test_a_run_in_a_bucket_has_each_row_once(tmp_path: Path) -> None:
    """Killed between writing its rows and its checkpoint, a run resumes from a snapshot that has these rows, too."""
    store = open_store(f"memory://{tmp_path.name}")
    rows = [row(1, step) for step in range(8)]
    metrics = Metrics(attempt_of(store, [0]))
    metrics.write(rows[:2])
    metrics.commit(2)
    metrics.write(rows[2:5])
    metrics.commit(5)
    metrics.write(rows[5:7])  # lost with the process
    metrics = Metrics(attempt_of(store, [0, 7]))
    metrics.restore(rows[2:7])
    metrics.write([row(2, 7)])
    metrics.close(8)
    parts = store.names("metrics")
    lines = [json.loads(line) for name in parts for line in store.read(name).splitlines()]
    assert lines == [*rows[:7], row(2, 7)]
    assert [r["step"] for r in read_metrics(store)] == list(range(8))


def test_a_run_killed_before_its_first_row_leaves_no_empty_line(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    Metrics(attempt_of(store, [0])).tensorboard.close()
    (tmp_path / METRICS).touch()
    metrics = Metrics(attempt_of(store, [0, 0]))
    metrics.write([row(2, 0)])
    metrics.close(1)
    assert parsed(tmp_path / METRICS) == [row(2, 0)]
