"""What Prometheus scrapes of a run, through Ray's own metrics: `ray_maestream_…`, each with the run's id.

Every node's metrics agent has a port for it; `ray start --head` lists them in its session's prom_metrics_service_discovery.json.
"""

import time
from typing import Any

from ray.util.metrics import Gauge

NAMES = {
    "images_per_second": "of all workers, since the last look",
    "loss": "of the newest step",
    "step": "steps that are done",
    "data_wait_share": "of the first worker's time, since the last look",
    "workers": "that train",
    "restarts": "of the workers, since this command began",
    "redone_steps": "since this command began",
    "bad_samples": "distinct ones, of the whole run",
    "cache_hit_rate": "bytes from the kept part over all that are read, of the first worker",
    "committed_step": "the newest commit of this command",
    "committed_age_seconds": "since it was committed",
}


class Gauges:
    """In the process of an actor: Ray's metrics belong to workers."""

    def __init__(self, run_id: str) -> None:
        self.gauges = {
            name: Gauge(f"maestream_{name}", description=says, tag_keys=("run",))
            for name, says in NAMES.items()
        }
        for gauge in self.gauges.values():
            gauge.set_default_tags({"run": run_id})
        self.attempts = self.redone = 0

    def see_row(self, row: dict[str, Any]) -> None:
        """Metrics of a step, with what the loop adds for whoever watches."""
        now = {
            "images_per_second": row["img_per_s"],
            "loss": row["loss"],
            "step": row["step"] + 1,
            "data_wait_share": row["time"]["data_wait"],
            "workers": row["world_size"],
            "restarts": max(self.attempts - 1, 0),
            "redone_steps": self.redone,
            "bad_samples": row["known_bad"],
            "cache_hit_rate": row["cache_hit_rate"],
        }
        if row["committed"]:
            step, at = row["committed"]
            now |= {"committed_step": step, "committed_age_seconds": time.time() - at}
        for name, value in now.items():
            self.gauges[name].set(float(value))

    def see_attempt(self, event: dict[str, Any]) -> None:
        """An attempt that has done its first step. It shows with the next row: what is set once, and early, gets lost."""
        self.attempts += 1
        self.redone += event.get("redone", 0)
