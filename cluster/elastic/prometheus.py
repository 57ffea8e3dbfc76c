"""Prometheus metrics of a run: `ray_maestream_…`, labelled with the run id and exported through Ray.

Each node's metrics agent serves them on a port. `ray start --head` lists the ports in the file
prom_metrics_service_discovery.json of its session, in Prometheus' format for service discovery.
"""

import time
from typing import Any

from ray.util.metrics import Gauge

METRICS = {
    "images_per_second": "Images per second of all workers, since the last log step",
    "loss": "Training loss of the newest logged step",
    "step": "Finished optimizer steps",
    "data_wait_share": "Fraction of time that worker 0 waited for data, since the last log step",
    "workers": "Workers that train",
    "worker_changes": "Changes of the workers since the command was started: lost, left, joined or restarted",
    "redone_steps": "Steps repeated after changes since the command was started",
    "bad_samples": "Distinct bad samples in the whole run",
    "cache_hit_rate": "Fraction of bytes that worker 0 read from the disk cache",
    "committed_step": "Step of the newest checkpoint committed since the command was started",
    "committed_age_seconds": "Seconds since that checkpoint was committed",
}


class Gauges:
    """The metrics of one run. Has to be created in an actor: Ray exports metrics of workers only."""

    def __init__(self, run_id: str) -> None:
        self.gauges = {
            name: Gauge(f"maestream_{name}", description=description, tag_keys=("run",))
            for name, description in METRICS.items()
        }
        for gauge in self.gauges.values():
            gauge.set_default_tags({"run": run_id})
        self.attempts = self.redone = 0

    def update(self, row: dict[str, Any]) -> None:
        """Set all gauges from the metrics of a step, as the training loop reports them."""
        values = {
            "images_per_second": row["img_per_s"],
            "loss": row["loss"],
            "step": row["step"] + 1,
            "data_wait_share": row["time"]["data_wait"],
            "workers": row["world_size"],
            "worker_changes": max(self.attempts - 1, 0),
            "redone_steps": self.redone,
            "bad_samples": row["known_bad"],
            "cache_hit_rate": row["cache_hit_rate"],
        }
        if row["committed"]:
            step, committed_at = row["committed"]
            values |= {"committed_step": step, "committed_age_seconds": time.time() - committed_at}
        for name, value in values.items():
            self.gauges[name].set(float(value))

    def count_attempt(self, event: dict[str, Any]) -> None:
        """Count an attempt that has finished its first step.

        The gauges are set by the next `update`: Ray loses a value that is set only once, early in a process.
        """
        self.attempts += 1
        self.redone += event.get("redone", 0)
