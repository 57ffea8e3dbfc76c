"""A stand-in for NCCL, on the CPU: if a worker is lost, nothing fails; operations hang until `abort`, and end without a result."""

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from trainer.group.gloo import Endpoint, GlooDevice

NONSENSE = 77  # what is in a tensor after an operation that was aborted


class HangingBackend:
    """A `trainer.group.group.Backend` that is gloo but for errors."""

    def __init__(self) -> None:
        self.device = GlooDevice("127.0.0.1")
        self.others: list[Endpoint] = []
        self.aborted = threading.Event()

    def connect(self, store: dist.Store, rank: int, size: int) -> Any:
        self.aborted = aborted = threading.Event()
        store.set(f"endpoint/{rank}", json.dumps(self.device.endpoint))
        try:
            endpoints = [tuple(json.loads(store.get(f"endpoint/{other}"))) for other in range(size)]
            self.others = [endpoint for endpoint in endpoints if endpoint != self.device.endpoint]
            return HangingGroup(self.device.connect(store, rank, size), aborted)
        except RuntimeError:
            aborted.wait()
            raise

    def abort(self, others: Sequence[Endpoint]) -> None:
        self.aborted.set()
        self.device.abort(self.others)


class HangingGroup:
    def __init__(self, group: dist.ProcessGroupGloo, aborted: threading.Event) -> None:
        self.group, self.aborted = group, aborted

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        return self._start(lambda: self.group.allreduce(tensors, options), tensors)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Any:
        return self._start(lambda: self.group.broadcast(tensors, options), tensors)

    def allgather(self, outputs: list[list[torch.Tensor]], tensors: list[torch.Tensor]) -> Any:
        return self._start(lambda: self.group.allgather(outputs, tensors), outputs[0])

    def gather(self, outputs: list[list[torch.Tensor]], tensors: list[torch.Tensor], options: Any) -> Any:
        return self._start(
            lambda: self.group.gather(outputs, tensors, options), outputs[0] if outputs else []
        )

    def _start(self, start: Callable[[], Any], results: list[torch.Tensor]) -> "HangingWork":
        try:
            return HangingWork(start(), self.aborted, results)
        except RuntimeError:
            return HangingWork(None, self.aborted, results)


class HangingWork:
    def __init__(self, work: Any, aborted: threading.Event, results: list[torch.Tensor]) -> None:
        self.work, self.aborted, self.results = work, aborted, results

    def wait(self) -> None:
        try:
            if self.work is None:
                raise RuntimeError
            self.work.wait()
        except RuntimeError:
            self.aborted.wait()
            for result in self.results:
                result.fill_(NONSENSE)
