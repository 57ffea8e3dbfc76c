"""Where the time of a batch goes."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Spent:
    """Thread-seconds by stage: ten threads at it for a second are ten. They are seconds by the clock, so where
    threads outnumber cores each second that a thread waits for a core is in its stage too."""

    storage: float = 0.0  # the reading thread waits for bytes
    read: float = 0.0  # its own work: order, indexes, checksums
    decode: float = 0.0  # with resizing, where an executor does both in one (DALI)
    resize: float = 0.0  # 0 then
    copy: float = 0.0  # out of the executor's memory; 0 where it writes into the batch itself

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*map(sum, zip(astuple(self), astuple(other), strict=True)))
