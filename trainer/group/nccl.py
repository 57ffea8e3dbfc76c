"""NCCL process groups that can be aborted.

Not run on a GPU yet. Tests use a stand-in that hangs as NCCL does: an operation with a lost worker never ends by itself, and
after `abort` it ends without an error.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from trainer.group.gloo import TIMEOUT, Endpoint

# torch would end the process when an operation fails or hangs; here the group is rebuilt instead. They have to be set before
# the first group is made (torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp of torch 2.13).
SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class Nccl:
    """A `trainer.group.group.Backend` for GPUs."""

    def __init__(self, device: torch.device) -> None:
        os.environ.update(SETTINGS)
        self.device = device
        self.group: Any = None

    def connect(self, store: dist.Store, rank: int, size: int) -> Any:
        """Connect to the other workers of a group. Raises RuntimeError if one cannot be reached, or after `abort`."""
        torch.cuda.set_device(self.device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        self.group = group
        # Workers connect in the first operation. That of a step would be too late: they begin it at different times, and wait
        # for each other at the store, where `abort` does not reach them.
        group.allreduce([torch.zeros(1, device=self.device)]).wait()
        torch.cuda.current_stream(self.device).synchronize()
        return group

    def abort(self, others: Sequence[Endpoint]) -> None:
        """Make all operations of the newest group end, without a result."""
        group, self.group = self.group, None
        if group is not None:
            group.abort()
