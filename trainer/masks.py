"""Which patches are masked: a hash of (seed, epoch, sample id, patch), computed on the device.

The same function as `pipeline.hashing.hash64`, in torch's int64 (which wraps, as uint64 does).
"""

import torch

from pipeline.hashing import GOLDEN, MULTIPLIER_1, MULTIPLIER_2

MASK_STREAM = 21


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # logical: int64's own shift keeps the sign


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def mask_noise(seed: int, epoch: int, sample_ids: torch.Tensor, patches: int) -> torch.Tensor:
    """Noise whose smallest values are the patches to keep.

    Args:
        sample_ids: int64[n].
        patches: L, patches an image.

    Returns int64[n, L], on the device of `sample_ids`.
    """
    patch = torch.arange(patches, device=sample_ids.device)
    state = torch.zeros((), dtype=torch.int64, device=sample_ids.device)
    for part in (seed, MASK_STREAM, epoch, sample_ids[:, None], patch[None, :]):
        state = _mix((state ^ part) + _signed(GOLDEN))
    return state
