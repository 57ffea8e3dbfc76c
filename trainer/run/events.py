"""The event log of a run: RUN/events.jsonl, a line of JSON for each start, failure and change of its workers.

Object stores cannot append, so there each owner of the run has a file of its own, RUN/events/<attempt>-<owner>.jsonl, and
writes all of it again at each event.
"""

from pathlib import Path
from typing import Any

from pipeline.storage.store import Store
from trainer.run.json_lines import append_lines, read_lines, repair_lines, to_line
from trainer.run.run import Run

EVENTS = "events.jsonl"


class Events:
    """Writes the events of one owner of a run."""

    def __init__(self, run: Run) -> None:
        self.store = run.store
        self.name = f"events/{run.attempt:04d}-{run.owner}.jsonl"
        self.lines: list[bytes] = []
        if run.store.is_local:
            repair_lines(Path(run.store.path(EVENTS)))

    def append(self, event: dict[str, Any]) -> None:
        if self.store.is_local:
            append_lines(Path(self.store.path(EVENTS)), [event])
        else:
            self.lines.append(to_line(event))
            self.store.write(self.name, b"".join(self.lines))


def read_events(store: Store) -> list[dict[str, Any]]:
    """Read all events of a run, oldest first."""
    names = [EVENTS] if store.exists(EVENTS) else store.names("events")
    events = [event for name in names for event in read_lines(store, name)]
    return sorted(events, key=lambda event: event["time"])
