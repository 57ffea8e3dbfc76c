"""Counter-based random numbers: a vectorised hash of integers.

The sample order, crops and flips are functions of (seed, epoch, sample id). A resumed run computes them from these
numbers; no random state has to be saved or replayed.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators", figure 16) with Stafford's constants (variant 13). `trainer.models.device_hashing` computes the same
function on the device.
"""

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB

U64 = npt.NDArray[np.uint64]


def _mix(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    return x ^ (x >> np.uint64(31))


def hash64(*parts: npt.ArrayLike) -> U64:
    """Hash non-negative integers to 64 bits. Arrays broadcast against each other.

    Returns uint64 of the broadcast shape. The order of the arguments matters.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # unsigned overflow is intended
        for part in parts:
            state = _mix((state ^ np.asarray(part, np.uint64)) + np.uint64(GOLDEN))
    return state


def uniform(*parts: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return float64 in [0, 1) with 53 random bits each, from `hash64` of the same arguments."""
    return (hash64(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53
