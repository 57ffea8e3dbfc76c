"""Record the steps of a run from outside, and compute the cost of a fault (benchmarks.elasticity)."""

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.elasticity.ray_cluster import other_running_processes
from benchmarks.elasticity.report import Cost


@dataclass(frozen=True)
class Step:
    at: float  # time.monotonic() when its row was read
    attempt: int
    step: int
    world_size: int
    loss: float


class StepWatcher:
    """Follows a file that gets a row per step.

    Attributes:
        steps: each (attempt, step) once, in order.
        others: for each second, how many processes other than this benchmark's ran or waited for a core.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[Step] = []
        self.others: list[int] = []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._read, name="steps", daemon=True)
        self.thread.start()
        threading.Thread(target=self._count_others, name="others", daemon=True).start()

    def _count_others(self) -> None:
        while not self.ending.wait(1):
            self.others.append(len(other_running_processes()))

    def _read(self) -> None:
        seen: set[tuple[int, int]] = set()
        while not self.path.exists():
            if self.ending.wait(0.02):
                return
        with self.path.open() as file:
            part = ""
            while not self.ending.wait(0.02):
                *lines, part = (part + file.read()).split("\n")
                at = time.monotonic()
                for line in lines:
                    with contextlib.suppress(ValueError):  # a line that was cut short by a kill
                        row = json.loads(line)
                        if (row["attempt"], row["step"]) not in seen:
                            seen.add((row["attempt"], row["step"]))
                            self.steps.append(
                                Step(at, row["attempt"], row["step"], row["world_size"], row["loss"])
                            )

    def close(self) -> None:
        self.ending.set()
        self.thread.join()


def cost(steps: list[Step], fault_at: float) -> Cost:
    """The cost of a fault at `fault_at` (time.monotonic())."""
    before_fault = [step for step in steps if step.at <= fault_at]
    sizes, gap_s, lost_s, redone = [before_fault[-1].world_size], 0.0, 0.0, 0
    furthest, lost_since = before_fault[-1].step, None
    for before, now in pairwise(steps[len(before_fault) - 1 :]):
        if now.attempt != before.attempt:
            gap_s += now.at - before.at
            sizes.append(now.world_size)
            lost_since = before.at if lost_since is None else lost_since
        if now.step <= furthest:
            redone += 1
        elif lost_since is not None:
            lost_s, lost_since = lost_s + now.at - lost_since, None
        furthest = max(furthest, now.step)
    rate = (len(before_fault) - 1) / (before_fault[-1].at - before_fault[0].at)
    return Cost(sizes, len(sizes) - 1, round(gap_s, 1), redone, round(lost_s, 1), round(rate, 1))
