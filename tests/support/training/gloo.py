"""Workers without Ray: processes that a test starts, and their process group."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch._dynamo  # noqa: F401  # see gloo_group
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from trainer.group.group import Group

# Slow imports happen once, in the process that workers are forked from.
multiprocessing.set_forkserver_preload(["torch._dynamo", "trainer.train.registry"])


def run_workers(worker: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Run `worker(rank, world_size, *arguments)` in a process per rank. Raises the exception of a worker that fails."""
    start_processes(worker, (world_size, *arguments), nprocs=world_size, start_method="forkserver")


@contextmanager
def gloo_group(rendezvous: str, rank: int, world_size: int) -> Iterator[Group]:
    """Create a fixed gloo process group, and destroy it and its threads at the end.

    A group that still exists when the interpreter exits may abort it, because its thread needs the GIL to free the last
    tensors (pytorch #190489). torch.optim imports torch._dynamo, which keeps a reference to a group that exists by then; so
    this module imports it first.
    """
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    yield Group(fixed=dist.group.WORLD)
    dist.destroy_process_group()
