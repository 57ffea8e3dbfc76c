"""What happened to a run: RUN/events.jsonl, a line of JSON for each start, failure and change of its workers.

On object stores, which cannot append, RUN/events/<attempt>-<owner>.jsonl: each owner of the run writes its own, whole,
each time that something happens.
"""

import json
from typing import Any

from pipeline.storage import Store
from trainer.run import Run

EVENTS = "events.jsonl"


class Events:
    """Keeps the events of one owner of a run."""

    def __init__(self, run: Run) -> None:
        self.store = run.store
        self.name = f"events/{run.attempt:04d}-{run.owner}.jsonl"
        self.lines: list[str] = []

    def keep(self, event: dict[str, Any]) -> None:
        line = json.dumps(event) + "\n"
        if self.store.is_local:
            with open(self.store.path(EVENTS), "a") as file:
                file.write(line)
        else:
            self.lines.append(line)
            self.store.write(self.name, "".join(self.lines).encode())


def read_events(store: Store) -> list[dict[str, Any]]:
    """All that happened, in order."""
    names = [EVENTS] if store.exists(EVENTS) else store.names("events")
    found = []
    for name in names:
        for line in store.read(name).decode().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # a line that a kill cut short
                continue
    return sorted(found, key=lambda event: event["time"])
