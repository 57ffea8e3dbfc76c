"""The event log of a run: RUN/events.jsonl, a line of JSON for each start, failure and change of its workers.

Object stores cannot append, so there each owner of the run has a file of its own, RUN/events/<attempt>-<owner>.jsonl, and
writes all of it again at each event.
"""

import json
from typing import Any

from pipeline.storage.store import Store
from trainer.run.run import Run

EVENTS = "events.jsonl"


class Events:
    """Writes the events of one owner of a run."""

    def __init__(self, run: Run) -> None:
        self.store = run.store
        self.name = f"events/{run.attempt:04d}-{run.owner}.jsonl"
        self.lines: list[str] = []

    def append(self, event: dict[str, Any]) -> None:
        line = json.dumps(event) + "\n"
        if self.store.is_local:
            with open(self.store.path(EVENTS), "a") as file:
                file.write(line)
        else:
            self.lines.append(line)
            self.store.write(self.name, "".join(self.lines).encode())


def read_events(store: Store) -> list[dict[str, Any]]:
    """Read all events of a run, oldest first."""
    names = [EVENTS] if store.exists(EVENTS) else store.names("events")
    events = []
    for name in names:
        for line in store.read(name).decode().splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:  # an incomplete line, from a writer that was killed
                continue
    return sorted(events, key=lambda event: event["time"])
