"""Workers without Ray: processes that a test starts, and a process group among them."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch._dynamo  # noqa: F401  # see gloo_group
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

# What takes seconds to import is imported once, in a process that workers are forked from.
multiprocessing.set_forkserver_preload(["torch._dynamo", "trainer.tasks"])


def run_workers(worker: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """`worker(rank, world_size, *arguments)` in a process for each rank; an exception of one is raised here."""
    start_processes(worker, (world_size, *arguments), nprocs=world_size, start_method="forkserver")


@contextmanager
def gloo_group(rendezvous: str, rank: int, world_size: int) -> Iterator[None]:
    """The group, gone with its threads at the end: one that is still there when the interpreter ends may abort it, as
    its thread wants Python's lock to free the last tensors (pytorch #190489). torch.optim imports torch._dynamo, which
    keeps a group that exists by then: so it is imported here, before."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    yield
    dist.destroy_process_group()
