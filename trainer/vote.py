"""How all workers leave a run after the same step, although each is told at another moment."""

from enum import IntEnum

import torch
import torch.distributed as dist


class Wish(IntEnum):
    """What a worker has been told to do; of several wishes the highest counts."""

    GO_ON = 0
    MOVE = 1  # leave: all are started again at once, and the machines stay
    SAVE = 2  # commit, and leave: machines go, or the run is to end


class Vote:
    """A vote after each step, in the order of the steps on every rank. It is counted while the next step runs, on the
    CPU: nobody waits for it, and a device least of all."""

    def __init__(self, world_size: int) -> None:
        self.group = dist.new_group(backend="gloo") if world_size > 1 else None
        self.cast_before: tuple[torch.Tensor, dist.Work | None] | None = None

    def cast(self, wish: Wish) -> Wish:
        """Vote after this step. Returns what was voted after the step before: the same on every rank."""
        before = self.cast_before
        vote = torch.tensor(int(wish))
        work = None
        if self.group is not None:
            work = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.cast_before = vote, work
        if before is None:
            return Wish.GO_ON
        counted, under_way = before
        if under_way is not None:
            under_way.wait()
        return Wish(int(counted))
