"""The steps of a run as seen from without, and what a fault has cost of them (benchmarks.elasticity)."""

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.elasticity_report import Cost
from benchmarks.raylets import running_others


@dataclass(frozen=True)
class Step:
    at: float  # time.monotonic, when it was seen
    attempt: int
    step: int
    world_size: int
    loss: float


class Watch:
    """Reads the file that gets a row a step, as it grows.

    `steps` has each (attempt, step) once, in order; `others`, for each second, how many processes besides this benchmark's
    wanted a core.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[Step] = []
        self.others: list[int] = []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._read, name="watch", daemon=True)
        self.thread.start()
        threading.Thread(target=self._look_around, name="others", daemon=True).start()

    def _look_around(self) -> None:
        while not self.ending.wait(1):
            self.others.append(len(running_others()))

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
                    with contextlib.suppress(ValueError):  # a line that a kill cut short
                        row = json.loads(line)
                        if (row["attempt"], row["step"]) not in seen:
                            seen.add((row["attempt"], row["step"]))
                            self.steps.append(
                                Step(at, row["attempt"], row["step"], row["world_size"], row["loss"])
                            )

    def close(self) -> None:
        self.ending.set()
        self.thread.join()


def cost(steps: list[Step], hit_at: float) -> Cost:
    """What a fault at `hit_at` has cost."""
    untouched = [step for step in steps if step.at <= hit_at]
    sizes, gap_s, lost_s, redone = [untouched[-1].world_size], 0.0, 0.0, 0
    furthest, lost_since = untouched[-1].step, None
    for before, now in pairwise(steps[len(untouched) - 1 :]):
        if now.attempt != before.attempt:
            gap_s += now.at - before.at
            sizes.append(now.world_size)
            lost_since = before.at if lost_since is None else lost_since
        if now.step <= furthest:
            redone += 1
        elif lost_since is not None:
            lost_s, lost_since = lost_s + now.at - lost_since, None
        furthest = max(furthest, now.step)
    rate = (len(untouched) - 1) / (untouched[-1].at - untouched[0].at)
    return Cost(sizes, len(sizes) - 1, round(gap_s, 1), redone, round(lost_s, 1), round(rate, 1))
