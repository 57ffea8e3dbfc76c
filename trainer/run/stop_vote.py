"""How all workers stop after the same step, although each gets the stop request at a different moment."""

from enum import IntEnum

import torch
import torch.distributed as dist


class StopRequest(IntEnum):
    """What a worker was asked to do. If workers were asked for different things, the highest value counts."""

    NONE = 0
    RESTART = 1  # stop; all workers start again at once, on the same machines
    SAVE = 2  # save a checkpoint, then stop: machines go away, or the user stops the run


class StopVote:
    """A vote of all workers after each step. It is counted on the CPU while the next step runs, so no step waits for it."""

    def __init__(self, world_size: int) -> None:
        self.group = dist.new_group(backend="gloo") if world_size > 1 else None
        self.previous: tuple[torch.Tensor, dist.Work | None] | None = None

    def cast(self, request: StopRequest) -> StopRequest:
        """Vote after a step, and return the result of the vote after the step before. It is the same on every rank."""
        previous = self.previous
        vote = torch.tensor(int(request))
        work = None
        if self.group is not None:
            work = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.previous = vote, work
        if previous is None:
            return StopRequest.NONE
        result, pending = previous
        if pending is not None:
            pending.wait()
        return StopRequest(int(result))
