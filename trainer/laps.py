"""Where the time of training goes, and no wait for the device to find out."""

import time
from collections.abc import Callable
from itertools import pairwise

import torch

# data_wait: for a batch. host_to_device: its copy. step: forward, backward, optimizer. all_reduce: what of it the backward
# pass did not hide. checkpoint: copies for commits and snapshots. other: metrics.
PARTS = ("data_wait", "host_to_device", "step", "all_reduce", "checkpoint", "other")
Moment = float | torch.cuda.Event


class Laps:
    """A lap is the time since the one before, and has the name of one of PARTS.

    On a GPU laps are the device's: events in its stream, which are read when it has come to them anyway. So where the host
    waits for data and the device still has work, the device's lap is short. Nothing is kept before `start`.
    """

    def __init__(self) -> None:
        self.moments: list[tuple[str, Moment]] = []  # each with the name of what ended then
        self.moment: Callable[[], Moment] | None = None

    def start(self, device: torch.device) -> None:
        """Begin, or begin again: what came since the last `take` is forgotten."""
        self.moment = _device_moment if device.type == "cuda" else time.perf_counter
        self.moments = [("", self.moment())]

    def lap(self, name: str) -> None:
        if self.moment is not None:
            self.moments.append((name, self.moment()))

    def take(self) -> dict[str, float]:
        """Seconds of each of PARTS since `start` or the last `take`. Waits until the device has done them."""
        seconds = dict.fromkeys(PARTS, 0.0)
        last = self.moments[-1][1]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()
        for (_, before), (name, now) in pairwise(self.moments):
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
    """Of their sum."""
    total = sum(seconds.values()) or 1.0
    return {name: part / total for name, part in seconds.items()}
