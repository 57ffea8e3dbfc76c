"""Work on many things: in threads, in order, and wherever a `Run` has it done, in any order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

THREADS = 8  # reads wait, and decoding releases the GIL
T = TypeVar("T")
R = TypeVar("R")
# What a function makes of each of its inputs, in any order: here that is Python's `map`, `cluster.sharding` has Ray tasks.
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def map_ahead(
    function: Callable[[T], R],
    inputs: Iterable[T],
    threads: int = THREADS,
    cost: Callable[[T], int] = lambda _: 0,
    most: int = 1,
) -> Iterator[R]:
    """`map` in threads, in order. At most four results a thread wait, of inputs that cost no more than `most` together;
    there is always one under way."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        spent = 0
        try:
            for value in inputs:
                while waiting and (len(waiting) > 4 * threads or spent + cost(value) > most):
                    done, its_cost = waiting.popleft()
                    yield done.result()
                    spent -= its_cost
                waiting.append((pool.submit(function, value), cost(value)))
                spent += cost(value)
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)
