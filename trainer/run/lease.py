"""A run folder has one owner at a time. RUN/lease.json names it, and has a counter that the owner increments while it lives.

Clocks of different machines are never compared: an owner is alive if the counter changes while another process watches.
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
from pipeline.storage.store import Store
from trainer.run.run import LEASE

BEAT_S = 2.0  # between two increments
EXPIRY_S = 10.0  # an owner whose counter does not change for this long is dead


class Lease:
    """Ownership of a run folder, a context manager.

    Args:
        store: the run folder.
        notify: prints a message to the user: that this process waits for another owner, or takes the run over.
        on_lost: called once, from another thread, when another process has taken the run over.

    Entering it raises UserError if another owner is alive.
    """

    def __init__(self, store: Store, notify: Callable[[str], None], on_lost: Callable[[], None]) -> None:
        self.store, self.notify, self.on_lost = store, notify, on_lost
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
        """Wait until the previous owner is known to be dead or has released the lease. UserError if it is alive."""
        owner = f"process {before.get('pid')} on {before.get('host')}"
        self.notify(
            f"{self.store.url} is owned by {owner}; waiting {EXPIRY_S:g} s to see whether it is alive"
        )
        deadline = time.monotonic() + EXPIRY_S
        while time.monotonic() < deadline:
            time.sleep(BEAT_S / 4)
            now = _read(self.store)
            if now is None:
                return
            if now != before:
                raise UserError(
                    f"{self.store.url} is owned by {owner}, which is alive: stop it first, or choose another folder"
                )
        self.notify(f"Previous owner is dead; taking over {self.store.url}.")

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
            except (UserError, OSError):
                # Storage is unavailable. If another process takes over in the meantime, the next beat notices.
                continue

    def _write(self, beat: int) -> None:
        text = {"owner": self.owner, "beat": beat, "host": socket.gethostname(), "pid": os.getpid()}
        self.store.write(LEASE, json.dumps(text | {"processes": process_namespace()}).encode())


def _read(store: Store) -> dict[str, Any] | None:
    try:
        found = json.loads(store.read(LEASE))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}  # damaged, so it names no owner
    return found if isinstance(found, dict) else {}


def process_namespace() -> str | None:
    """Identify the space of process ids that this process is in: the boot of the machine, and the namespace (namespaces(7))."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _is_dead_here(lease: dict[str, Any]) -> bool:
    """Whether the owner was a process on this machine that has ended, so that there is no need to wait."""
    if lease.get("processes") is None or lease["processes"] != process_namespace():
        return False
    try:
        os.kill(int(lease["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False
