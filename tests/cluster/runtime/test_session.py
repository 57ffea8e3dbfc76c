"""Errors of the start of Ray, and what a training command prints before it."""

import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import node
from rich.console import Console

from cluster.elastic.driver import train
from cluster.runtime.session import START_TIMEOUT, connect
from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from tests.support.training.small_runs import config_of

TIMEOUT = (
    "The current node timed out during startup. This could happen because some of the raylet failed to startup or the GCS "
    "has become overloaded."
)


def fail_with(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next start of Ray fail."""

    def init(**options: Any) -> None:
        raise Exception(text)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)


def test_a_start_that_takes_too_long_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert START_TIMEOUT in inspect.getsource(node)  # Ray still says so
    fail_with(TIMEOUT, monkeypatch)
    with pytest.raises(UserError) as caught:
        connect(1)
    assert str(caught.value) == (
        "Ray did not start on this machine within its time limit (is it busy?): run the command again "
        "(The current node timed out during startup)"
    )


def test_other_errors_of_the_start_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with("something else", monkeypatch)
    with pytest.raises(Exception, match="something else"):
        connect(1)


def test_training_says_that_ray_starts(
    scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(TIMEOUT, monkeypatch)
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(UserError, match="Ray did not start"):
        train(config_of(workers={"min": 1, "max": 4}), scenes.store.url, str(tmp_path / "run"), console)
    assert console.file.getvalue().splitlines()[-1:] == ["starting Ray and 1 to 4 workers …"]


def test_how_to_talk_to_s3_reaches_all_machines_but_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: started.update(options))
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    connect(1, {"A": "1"})
    found = started["runtime_env"]["env_vars"]
    assert found.items() >= {"AWS_REQUEST_PAYER": "requester", "AWS_NO_SIGN_REQUEST": "YES", "A": "1"}.items()
    assert "secret" not in found.values()
