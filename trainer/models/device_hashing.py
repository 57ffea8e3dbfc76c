"""Counter-based random numbers on the device: the hash of `pipeline.hashing` in torch.

torch supports little arithmetic on uint64; int64 wraps in the same way and gives the same bits.
"""

import math

import torch

from pipeline.hashing import GOLDEN, MULTIPLIER_1, MULTIPLIER_2


def _signed(constant: int) -> int:
    """Return the int64 with the bits of a uint64."""
    return constant - 2**64 if constant >= 2**63 else constant


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift logically; int64's own shift repeats the sign bit."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def hash64(*parts: int | torch.Tensor) -> torch.Tensor:
    """Hash non-negative integers to 64 bits.

    Args:
        parts: integers and integer tensors that broadcast together, at least one of them a tensor.

    Returns int64 of the broadcast shape, on the tensors' device.
    """
    device = next(part.device for part in parts if isinstance(part, torch.Tensor))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        state = _mix((state ^ part) + _signed(GOLDEN))
    return state


def uniform(*parts: int | torch.Tensor) -> torch.Tensor:
    """Draw float32 in [0, 1) with 24 random bits; the arguments are those of `hash64`."""
    return _shift_right(hash64(*parts), 40).float() * 2.0**-24


def normal(*parts: int | torch.Tensor) -> torch.Tensor:
    """Draw float32 from N(0, 1) by the Box-Muller transform; the arguments are those of `hash64`."""
    radius = (-2 * (1 - uniform(*parts, 0)).log()).sqrt()
    return radius * (2 * math.pi * uniform(*parts, 1)).cos()
