"""How all workers do the same thing after the same step, although each is asked at a different moment."""

from enum import IntEnum
from typing import NamedTuple

import torch
import torch.distributed as dist

from trainer.group.group import Group


class Request(IntEnum):
    """What a worker was asked to do. If workers were asked for different things, the highest value counts."""

    NONE = 0
    CHANGE = 1  # form the next generation: a worker wants to join
    LEAVE = 2  # the same, and this worker leaves: its machine goes away
    SAVE = 3  # save a checkpoint, then stop: the user stops the run, or all machines go away


class Votes(NamedTuple):
    """The result of a vote, the same on every rank."""

    request: Request
    saved: int  # steps in the newest checkpoint


class Vote:
    """A vote of all workers before each step. It is counted on the CPU during the step, so no step waits for it."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.previous: tuple[torch.Tensor, object] | None = None

    def cast(self, request: Request, saved: int) -> Votes:
        """Vote, and return the result of the vote before. Raises WorkerLost.

        Args:
            saved: steps in the newest checkpoint, as far as this worker knows. Rank 0 does.
        """
        previous = self.previous
        votes = torch.tensor([int(request), saved])
        self.previous = votes, self.group.start(votes, dist.ReduceOp.MAX)
        if previous is None:
            return Votes(Request.NONE, saved)
        votes, work = previous
        self.group.wait(work)
        return Votes(Request(int(votes[0])), int(votes[1]))
