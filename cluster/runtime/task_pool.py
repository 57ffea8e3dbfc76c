"""Run many small tasks on Ray: on all cores of this machine, or on the cluster at RAY_ADDRESS."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cluster.runtime.session import connect, explain_import_errors
from pipeline.cpus import available_cores
from pipeline.errors import UserError
from pipeline.parallel import ParallelMap

RETRIES = 10  # of a task whose process or machine dies


@contextmanager
def task_pool(tasks: int | None, runs_model: bool = False) -> Iterator[ParallelMap]:
    """Yield a function that maps another function over inputs in parallel Ray tasks. Results come in any order.

    Ray takes seconds to start. It is started with the second input of the first call: a single input is processed here.

    Args:
        tasks: number of tasks that run at once. None: one per GPU if they run a model and there are GPUs, else one per
            core.
        runs_model: whether the tasks run a model. If so, they share the GPUs, and the cores in equal parts, as decoders
            and torch use several threads.
    """

    def run(function: Callable[[Any], Any], inputs: Iterable[Any]) -> Iterator[Any]:
        inputs = iter(inputs)
        first = list(itertools.islice(inputs, 2))
        inputs = itertools.chain(first, inputs)
        if len(first) < 2 or tasks == 1:
            return map(function, inputs)
        if not ray.is_initialized():
            connect(max(available_cores(), tasks or 0))
        resources = ray.cluster_resources()
        cores = max(int(resources.get("CPU", 1)), 1)
        gpus = int(resources.get("GPU", 0)) if runs_model else 0
        at_once = tasks or gpus or cores
        cores_per_task = max(cores // at_once, 1) if runs_model else 1
        gpus_per_task = min(gpus / at_once, 1)
        task = ray.remote(num_cpus=cores_per_task, num_gpus=gpus_per_task, max_retries=RETRIES)(function)
        return _run(task, inputs, at_once)

    try:
        with explain_import_errors():
            yield run
    finally:
        ray.shutdown()


def _run(task: Any, inputs: Iterator[Any], at_once: int) -> Iterator[Any]:
    """Yield the results of a Ray task for all inputs as they complete, with at most `at_once` tasks running."""
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
                f"a task was lost {RETRIES + 1} times: its machine may lack memory ({str(error).splitlines()[0]}); "
                "run the same command again to resume"
            ) from None
