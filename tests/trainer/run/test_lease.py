"""A run folder has one owner. While it is alive no other process gets the folder; after its death another does within seconds."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.storage.store import Store, open_store
from trainer.run import lease as module
from trainer.run.lease import LEASE, Lease


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "EXPIRY_S", 0.8)


def make_lease(store: Store, messages: list[str] | None = None, lost: threading.Event | None = None) -> Lease:
    return Lease(store, (messages if messages is not None else []).append, (lost or threading.Event()).set)


def write_lease(store: Store, **changes: Any) -> None:
    """Write the lease of an owner that died on another machine."""
    lease = {"owner": "another", "beat": 7, "host": "node-7", "pid": 1, "processes": "elsewhere"}
    store.write(LEASE, json.dumps(lease | changes).encode())


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path))
    return open_store(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def test_a_live_owner_keeps_the_folder_until_it_ends(store: Store) -> None:
    messages: list[str] = []
    with make_lease(store):
        time.sleep(0.15)
        with (
            pytest.raises(UserError, match=r"is owned by process \d+ on .*, which is alive: stop it first"),
            make_lease(store, messages),
        ):
            pass
        assert "to see whether it is alive" in messages[0]
    with make_lease(store, messages):
        pass
    assert len(messages) == 1  # no wait this time
    assert not store.exists(LEASE)


def test_a_dead_owner_is_replaced_after_the_expiry(store: Store) -> None:
    write_lease(store)
    messages: list[str] = []
    begin = time.monotonic()
    with make_lease(store, messages):
        assert time.monotonic() - begin >= 0.8
        assert json.loads(store.read(LEASE))["owner"] != "another"
    assert "process 1 on node-7" in messages[0]
    assert "taking" in messages[1]


def test_an_owner_that_died_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    store, messages = open_store(str(tmp_path)), list[str]()
    write_lease(
        store, processes=module.process_namespace(), pid=2**22 + 1
    )  # above the highest that Linux gives (proc(5))
    with make_lease(store, messages):
        pass
    assert messages == []


def test_on_lost_is_called_and_the_new_lease_is_kept(store: Store) -> None:
    lost = threading.Event()
    with make_lease(store, lost=lost) as lease:
        write_lease(store)
        assert lost.wait(10)
        assert lease.lost
    assert json.loads(store.read(LEASE))["owner"] == "another"


def test_a_damaged_lease_names_no_owner(store: Store) -> None:
    store.write(LEASE, b'{"owner": ')
    with make_lease(store):
        pass
