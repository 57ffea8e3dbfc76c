"""Time that the loader's threads spend on each stage of a batch."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class StageTimes:
    """Seconds per stage, summed over threads: ten threads that decode for one second count as ten seconds.

    This is wall-clock time, so where there are more threads than cores it includes the time that a thread waits for a
    core.
    """

    storage: float = 0.0  # the reading thread waits for storage
    read: float = 0.0  # the reading thread's own work: order, indexes, checksums
    decode: float = 0.0  # includes resizing where the decoder does both in one operation (DALI)
    resize: float = 0.0  # 0 where it is included in `decode`
    copy: float = 0.0  # out of the decoder's memory; 0 where it decodes into the batch itself

    def __add__(self, other: "StageTimes") -> "StageTimes":
        return StageTimes(*map(sum, zip(astuple(self), astuple(other), strict=True)))
