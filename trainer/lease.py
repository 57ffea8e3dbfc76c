"""A run folder has one owner: RUN/lease.json, whose beat goes on as long as the owner lives.

Nobody's clock is compared with another's: an owner is alive if its beat changes while one looks at it.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import Store
from trainer.run import LEASE

BEAT_S = 2.0  # between two beats
EXPIRY_S = 10.0  # without one an owner is dead


class Lease:
    """Ownership of a run folder, from entering to leaving the context.

    Args:
        store: the run folder.
        say: tells the person at the terminal that it waits, or takes over.
        on_lost: called once, from another thread, when somebody else has taken the run over.

    Entering raises UserError while another owner lives.
    """

    def __init__(self, store: Store, say: Callable[[str], None], on_lost: Callable[[], None]) -> None:
        self.store, self.say, self.on_lost = store, say, on_lost
        self.owner = uuid.uuid4().hex
        self.lost = False
        self.ending = threading.Event()
        self.beating = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        before = _read(self.store)
        if before is not None and not _is_dead_here(before):
            self._wait(before)
        self._write(0)
        self.beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.beating.join()
        if not self.lost:
            self.store.remove([LEASE])

    def _wait(self, before: dict[str, Any]) -> None:
        """Until the owner is dead, or gone. UserError if it lives."""
        whose = f"process {before.get('pid')} on {before.get('host')}"
        self.say(f"{self.store.url} has an owner, {whose}: waiting {EXPIRY_S:g} s to see whether it is alive")
        deadline = time.monotonic() + EXPIRY_S
        while time.monotonic() < deadline:
            time.sleep(BEAT_S / 4)
            now = _read(self.store)
            if now is None:
                return
            if now != before:
                raise UserError(
                    f"{self.store.url} is owned by {whose}: stop that one first, or choose another folder"
                )
        self.say(f"it is not: taking {self.store.url} over")

    def _beat(self) -> None:
        beat = 0
        while not self.ending.wait(BEAT_S):
            try:
                now = _read(self.store)
                if now is not None and now.get("owner") != self.owner:
                    self.lost = True
                    self.on_lost()
                    return
                beat += 1
                self._write(beat)
            except (
                UserError,
                OSError,
            ):  # storage is gone for now; who takes over meanwhile is seen by the next beat
                continue

    def _write(self, beat: int) -> None:
        text = {"owner": self.owner, "beat": beat, "host": socket.gethostname(), "pid": os.getpid()}
        self.store.write(LEASE, json.dumps(text | {"processes": _processes()}).encode())


def _read(store: Store) -> dict[str, Any] | None:
    try:
        found = json.loads(store.read(LEASE))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}  # nobody's
    return found if isinstance(found, dict) else {}


def _processes() -> str | None:
    """What tells one space of process ids from all others: a boot of a machine, and a namespace (namespaces(7))."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _is_dead_here(lease: dict[str, Any]) -> bool:
    """Whether its owner was a process beside this one, and is no more: then there is nothing to wait for."""
    if lease.get("processes") is None or lease["processes"] != _processes():
        return False
    try:
        os.kill(int(lease["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False
