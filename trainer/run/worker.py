"""A worker of a run: where it trains, and whom it informs. What the run itself is: `trainer.run.run.Run`."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.run.step_timer import StepTimer
from trainer.run.stop_vote import StopRequest

log = logging.getLogger("maestream")


@dataclass(frozen=True)
class Worker:
    """One process of a run's process group, and its device. The default is a single worker on the CPU."""

    rank: int = 0
    world_size: int = 1
    node: str = "local"  # the machine's name
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ledger: bool = False  # whether metrics list the sample ids of each step
    timer: StepTimer = field(default_factory=StepTimer)  # metrics report rank 0's

    def log(self, lines: list[str]) -> None:
        """Print lines for the user, once for all ranks."""
        if self.rank == 0:
            for line in lines:
                log.warning("%s", line)


@dataclass(frozen=True)
class Callbacks:
    """How the training loop talks to the process that started it. The default ignores everything."""

    # Called after each step, on every rank:
    stop_request: Callable[[], StopRequest] = lambda: StopRequest.NONE
    # Called on rank 0 only:
    on_attempt: Callable[[int, int, int], None] = lambda attempt, start, world_size: None
    on_step: Callable[[int], None] = lambda steps_done: None
    on_metrics: Callable[[dict[str, Any]], None] = lambda row: None
    on_event: Callable[[dict[str, Any]], None] = lambda event: None
