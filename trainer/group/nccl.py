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
        """Make a process group. Its workers connect in the first operation."""
        torch.cuda.set_device(self.device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        self.group = dist.ProcessGroupNCCL(store, rank, size, options)
        return self.group

    def abort(self, others: Sequence[Endpoint]) -> None:
        """Make all operations of the newest group end, without a result."""
        if self.group is not None:
            self.group.abort()
