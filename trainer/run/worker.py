"""A worker of a run: where it trains, and whom it informs. What the run itself is: `trainer.run.run.Run`."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from trainer.group.group import Group
from trainer.group.requests import Request
from trainer.run.step_timer import StepTimer

log = logging.getLogger("maestream")


@dataclass(frozen=True)
class Worker:
    """One process of a run's process group, and its device. The default is a single worker on the CPU."""

    group: Group = field(default_factory=Group)
    node: str = "local"  # the machine's name
    ledger: bool = False  # whether metrics list the sample ids of each step
    reports: bool = True  # whether it tells what all workers measure, before they have ranks
    timer: StepTimer = field(default_factory=StepTimer)  # metrics report rank 0's

    @property
    def device(self) -> torch.device:
        return self.group.device

    @property
    def rank(self) -> int:
        """The number of this worker, from 0. It may change when the group does, as may the world size."""
        return self.group.rank

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self.group.size

    def log(self, lines: list[str]) -> None:
        """Print lines for the user, once for all ranks."""
        if self.rank == 0:
            for line in lines:
                log.warning("%s", line)


class Upcoming(NamedTuple):
    """Where a worker is expected to join others that train already."""

    step: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class Callbacks:
    """How the training loop talks to the process that started it. The default ignores everything."""

    # Called before each step, on every rank:
    request: Callable[[], Request] = lambda: Request.NONE
    # Called once, before the worker meets the others; None if none trains yet:
    upcoming: Callable[[], Upcoming | None] = lambda: None
    # Called on rank 0 only:
    on_attempt: Callable[[int, int, int], None] = lambda attempt, start, world_size: None
    on_step: Callable[[int], None] = lambda steps_done: None
    on_metrics: Callable[[dict[str, Any]], None] = lambda row: None
    on_event: Callable[[dict[str, Any]], None] = lambda event: None
