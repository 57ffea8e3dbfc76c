"""A run folder has one owner: while it lives nobody else gets it, when it is dead anybody does, within seconds."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.storage import Store, open_store
from trainer import lease as module
from trainer.lease import LEASE, Lease


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "EXPIRY_S", 0.8)


def make_lease(store: Store, said: list[str] | None = None, lost: threading.Event | None = None) -> Lease:
    return Lease(store, (said if said is not None else []).append, (lost or threading.Event()).set)


def leave(store: Store, **changes: Any) -> None:
    """A lease as an owner leaves it that died somewhere else."""
    left = {"owner": "another", "beat": 7, "host": "node-7", "pid": 1, "processes": "elsewhere"}
    store.write(LEASE, json.dumps(left | changes).encode())


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path))
    return open_store(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def test_a_living_owner_is_left_alone_and_its_end_frees_the_folder(store: Store) -> None:
    said: list[str] = []
    with make_lease(store):
        time.sleep(0.15)
        with (
            pytest.raises(UserError, match=r"is owned by process \d+ on .*: stop that one first"),
            make_lease(store, said),
        ):
            pass
        assert "to see whether it is alive" in said[0]
    with make_lease(store, said):
        pass
    assert len(said) == 1  # nobody waited this time
    assert not store.exists(LEASE)


def test_a_dead_owner_is_followed_after_its_time(store: Store) -> None:
    leave(store)
    said: list[str] = []
    begin = time.monotonic()
    with make_lease(store, said):
        assert time.monotonic() - begin >= 0.8
        assert json.loads(store.read(LEASE))["owner"] != "another"
    assert "process 1 on node-7" in said[0]
    assert "taking" in said[1]


def test_an_owner_that_died_on_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    store, said = open_store(str(tmp_path)), list[str]()
    leave(store, processes=module._processes(), pid=2**22 + 1)  # above the highest that Linux gives (proc(5))
    with make_lease(store, said):
        pass
    assert said == []


def test_who_loses_the_run_is_told_and_leaves_the_other_s_lease(store: Store) -> None:
    lost = threading.Event()
    with make_lease(store, lost=lost) as lease:
        leave(store)
        assert lost.wait(10)
        assert lease.lost
    assert json.loads(store.read(LEASE))["owner"] == "another"


def test_a_damaged_lease_is_nobody_s(store: Store) -> None:
    store.write(LEASE, b'{"owner": ')
    with make_lease(store):
        pass
