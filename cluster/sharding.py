"""Work on shards as Ray tasks: on all cores of this machine, or of the cluster of RAY_ADDRESS."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cluster.connect import connect
from pipeline.ahead import Run
from pipeline.cores import available_cores
from pipeline.errors import UserError

RETRIES = 10  # of a task whose process, or machine, dies


@contextmanager
def ray_tasks(tasks: int | None, models: bool = False) -> Iterator[Run]:
    """Gives what does so many things at once: as many as there are cores, if `tasks` is None, or, if `models` run in them and
    there are GPUs, as many as there are of those. Ray is there from the first time on that there are two of them: it
    takes seconds, and what is small or refused should be done at once."""

    def run(function: Callable[[Any], Any], inputs: Iterable[Any]) -> Iterator[Any]:
        inputs = iter(inputs)
        first = list(itertools.islice(inputs, 2))
        inputs = itertools.chain(first, inputs)
        if len(first) < 2 or tasks == 1:
            return map(function, inputs)
        if not ray.is_initialized():
            connect(max(available_cores(), tasks or 0))
        there = ray.cluster_resources()
        cores, gpus = max(int(there.get("CPU", 1)), 1), int(there.get("GPU", 0)) if models else 0
        at_once = tasks or gpus or cores
        gpu = min(gpus / at_once, 1)
        cpus = (
            max(cores // at_once, 1) if models else 1
        )  # what decodes for a model, and what it computes, is threads
        return _run(ray.remote(num_cpus=cpus, num_gpus=gpu, max_retries=RETRIES)(function), inputs, at_once)

    try:
        yield run
    finally:
        ray.shutdown()


def _run(task: Any, inputs: Iterator[Any], at_once: int) -> Iterator[Any]:
    running: list[Any] = []
    while True:
        while len(running) < at_once and (value := next(inputs, None)) is not None:
            running.append(task.remote(value))
        if not running:
            return
        ready, running = ray.wait(running, num_returns=1)
        try:
            yield ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except ray.exceptions.RayError as error:
            raise UserError(
                f"a task was lost {RETRIES + 1} times: is there enough memory? ({str(error).splitlines()[0]}). The same "
                "command goes on"
            ) from None
