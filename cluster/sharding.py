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
def ray_tasks(tasks: int | None) -> Iterator[Run]:
    """Gives what does so many things at once: as many as there are cores, if `tasks` is None. Ray is there from the first
    time on that there are two of them: it takes seconds, and what is small or refused should be done at once."""

    def run(function: Callable[[Any], Any], inputs: Iterable[Any]) -> Iterator[Any]:
        inputs = iter(inputs)
        first = list(itertools.islice(inputs, 2))
        inputs = itertools.chain(first, inputs)
        if len(first) < 2 or tasks == 1:
            return map(function, inputs)
        if not ray.is_initialized():
            connect(max(available_cores(), tasks or 0))
        at_once = tasks or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        return _run(function, inputs, at_once)

    try:
        yield run
    finally:
        ray.shutdown()


def _run(function: Callable[[Any], Any], inputs: Iterator[Any], at_once: int) -> Iterator[Any]:
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
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
