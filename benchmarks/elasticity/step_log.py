"""Record the steps of a run from outside, and compute the cost of a fault (benchmarks.elasticity)."""

import contextlib
import json
import statistics
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.elasticity.ray_cluster import other_running_processes
from benchmarks.elasticity.report import Cost

POLL_S = 0.004  # between two looks at the file


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
            if self.ending.wait(POLL_S):
                return
        with self.path.open() as file:
            part = ""
            while not self.ending.wait(POLL_S):
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
    before = sum(step.at <= fault_at for step in steps)
    took = [0.0, *(now.at - last.at for last, now in pairwise(steps))]  # from the row before
    step_s = statistics.median(took[1:before])
    sizes, pauses, redone = [steps[before - 1].world_size], [], 0
    furthest = steps[before - 1].step
    for i in range(before, len(steps)):
        redone += steps[i].step <= furthest
        furthest = max(furthest, steps[i].step)
        if steps[i].attempt != steps[i - 1].attempt:
            sizes.append(steps[i].world_size)
            # If rank 0 was lost, its successor may have written the row of the last step before.
            pauses.append(round(took[i - 1] + took[i] - 2 * step_s, 3))
    return Cost(sizes, pauses, redone, round(step_s, 3))
