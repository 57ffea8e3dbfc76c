"""Parallel maps: `map_ahead` in threads, in order; `ParallelMap` in any way, in any order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

THREADS = 8  # threads mostly wait for storage, and image decoding releases the GIL
T = TypeVar("T")
R = TypeVar("R")
# Calls a function on each input and yields the results in any order. The default is Python's `map`;
# `cluster.runtime.task_pool` provides one that uses Ray tasks. Function, inputs and results must be picklable.
ParallelMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def map_ahead(
    function: Callable[[T], R],
    inputs: Iterable[T],
    threads: int = THREADS,
    cost: Callable[[T], int] = lambda _: 0,
    max_cost: int = 1,
) -> Iterator[R]:
    """Like `map`, but in threads that work ahead of the consumer. Results come in order.

    Args:
        threads: number of threads; at most 4 inputs per thread are in progress or wait to be consumed.
        cost: of an input, in any unit, for example bytes.
        max_cost: total cost of the inputs that are in progress or wait to be consumed. An input that costs more is
            processed alone.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque = deque()
        total_cost = 0
        try:
            for value in inputs:
                while pending and (len(pending) > 4 * threads or total_cost + cost(value) > max_cost):
                    future, its_cost = pending.popleft()
                    yield future.result()
                    total_cost -= its_cost
                pending.append((pool.submit(function, value), cost(value)))
                total_cost += cost(value)
            while pending:
                yield pending.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)
