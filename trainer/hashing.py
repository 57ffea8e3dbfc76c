"""Counter-based randomness on the device: the function of `pipeline.hashing`, in torch's int64 (which wraps, as uint64
does)."""

import math

import torch

from pipeline.hashing import GOLDEN, MULTIPLIER_1, MULTIPLIER_2


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # logical: int64's own shift keeps the sign


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def hash64(*parts: int | torch.Tensor) -> torch.Tensor:
    """A 64-bit hash of non-negative integers, int64 of the shape that tensors among them broadcast to, on their device."""
    device = next(part.device for part in parts if isinstance(part, torch.Tensor))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        state = _mix((state ^ part) + _signed(GOLDEN))
    return state


def uniform(*parts: int | torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1), with 24 random bits each."""
    return _shift_right(hash64(*parts), 40).float() * 2.0**-24


def normal(*parts: int | torch.Tensor) -> torch.Tensor:
    """float32 of N(0, 1): Box and Muller's transform of two uniforms."""
    radius = (-2 * (1 - uniform(*parts, 0)).log()).sqrt()
    return radius * (2 * math.pi * uniform(*parts, 1)).cos()
