"""A process group among processes that a test spawns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch._dynamo  # noqa: F401  # see gloo_group
import torch.distributed as dist


@contextmanager
def gloo_group(rendezvous: str, rank: int, world_size: int) -> Iterator[None]:
    """The group, gone with its threads at the end: one that is still there when the interpreter ends may abort it, as
    its thread wants Python's lock to free the last tensors (pytorch #190489). torch.optim imports torch._dynamo, which
    keeps a group that exists by then: so it is imported here, before."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    yield
    dist.destroy_process_group()
