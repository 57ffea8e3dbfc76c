"""How long each part of a training step takes, measured without waiting for the device."""

import time
from collections.abc import Callable
from itertools import pairwise

import torch

# data_wait: waiting for a batch. host_to_device: copying it. step: forward pass, backward pass and optimizer. all_reduce:
# averaging gradients, as far as the backward pass does not hide it. checkpoint: copying the state for checkpoints and
# snapshots. other: metrics.
PARTS = ("data_wait", "host_to_device", "step", "all_reduce", "checkpoint", "other")
Moment = float | torch.cuda.Event


class StepTimer:
    """Measures the parts of steps: `mark` ends the part that began at the mark before.

    On a GPU the marks are CUDA events in the current stream, so it is the device's time that is measured: while the host
    waits for data and the device still has work, data_wait does not grow. Marks before `start` are ignored.
    """

    def __init__(self) -> None:
        self.moments: list[tuple[str, Moment]] = []  # each with the name of the part that it ended
        self.moment: Callable[[], Moment] | None = None

    def start(self, device: torch.device) -> None:
        """Start measuring. Marks since the last `take` are discarded."""
        self.moment = _device_moment if device.type == "cuda" else time.perf_counter
        self.moments = [("", self.moment())]

    def mark(self, name: str) -> None:
        """End a part; `name` is one of PARTS, or "" for time that is no part of a step."""
        if self.moment is not None:
            self.moments.append((name, self.moment()))

    def take(self) -> dict[str, float]:
        """Return the seconds of each of PARTS since `start` or the last `take`. Waits for the device to reach the last mark."""
        seconds = dict.fromkeys(PARTS, 0.0)
        last = self.moments[-1][1]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()
        for (_, before), (name, now) in pairwise(self.moments):
            if name:
                seconds[name] += _seconds(before, now)
        self.moments = [("", last)]
        return seconds


def _device_moment() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(before: Moment, now: Moment) -> float:
    if isinstance(before, torch.cuda.Event):
        assert isinstance(now, torch.cuda.Event)
        return before.elapsed_time(now) / 1000
    assert isinstance(now, float)
    return now - before


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Convert seconds of each part to shares of their sum."""
    total = sum(seconds.values()) or 1.0
    return {name: part / total for name, part in seconds.items()}
