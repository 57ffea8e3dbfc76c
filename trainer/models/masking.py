"""Noise that selects the masked patches: a pure function of (seed, epoch, sample id), computed on the device.

A sample's mask does not depend on the batch, the worker or the number of workers.
"""

import math

import torch

from trainer.config.model_schema import ModelConfig
from trainer.models.device_hashing import hash64, uniform

MASK_STREAM, BLOCK_STREAM = 21, 22  # streams of the hash, so that each use gets unrelated numbers
NUM_BLOCKS = 64  # drawn per image; if they cover too few patches, others are masked at random
# Of block-wise sampling (Bao et al. 2021, arXiv 2106.08254, algorithm 1).
MIN_BLOCK_PATCHES = 16
MIN_BLOCK_ASPECT = 0.3  # height over width


def masking_noise(config: ModelConfig, seed: int, epoch: int, sample_ids: torch.Tensor) -> torch.Tensor:
    """Compute the noise for `MAE.select_patches` under the config's sampling (paper, Table 1f).

    Args:
        sample_ids: int64[n].

    Returns int64[n, L] on the device of `sample_ids`; the patches with the smallest values stay visible.
    """
    noise = random_noise(seed, epoch, sample_ids, config.num_patches)
    if config.sampling == "random":
        return noise
    if config.sampling == "grid":
        priority = _grid_priority(*config.grid, noise.device)
    else:
        priority = _block_priority(*config.grid, seed, epoch, sample_ids)
    # The high bits order patches by priority, the 40 low bits are random among equals.
    return priority * 2**40 + (noise >> 24 & 2**40 - 1)


def random_noise(seed: int, epoch: int, sample_ids: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Compute noise for random sampling: each patch is equally likely to be masked.

    Args:
        sample_ids: int64[n].
        num_patches: L, patches per image.

    Returns int64[n, L] on the device of `sample_ids`.
    """
    patch = torch.arange(num_patches, device=sample_ids.device)
    return hash64(seed, MASK_STREAM, epoch, sample_ids[:, None], patch[None, :])


def _grid_priority(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return int64[1, L]: 0 for one of four patches in a regular grid, 1 for the others, which are masked."""
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return ((row[:, None] % 2 + column[None, :] % 2) > 0).long().reshape(1, -1)


def _block_priority(rows: int, columns: int, seed: int, epoch: int, sample_ids: torch.Tensor) -> torch.Tensor:
    """Draw rectangular blocks of patches, as BEiT does.

    Returns int64[n, L]: NUM_BLOCKS for patches in the first block, 1 for those only in the last, 0 for those in none.
    """
    block = torch.arange(NUM_BLOCKS, device=sample_ids.device)
    draws = [uniform(seed, BLOCK_STREAM, epoch, sample_ids[:, None], block, k) for k in range(4)]
    max_patches = max(rows * columns // 3, MIN_BLOCK_PATCHES)
    area = MIN_BLOCK_PATCHES + (max_patches - MIN_BLOCK_PATCHES) * draws[0]  # all [n, NUM_BLOCKS]
    aspect = torch.exp(math.log(MIN_BLOCK_ASPECT) * (1 - 2 * draws[1]))
    h = (area * aspect).sqrt().round().clamp(1, rows)
    w = (area / aspect).sqrt().round().clamp(1, columns)
    y, x = (draws[2] * (rows - h + 1)).floor(), (draws[3] * (columns - w + 1)).floor()
    row = torch.arange(rows, device=sample_ids.device)
    column = torch.arange(columns, device=sample_ids.device)
    in_rows = (row >= y[..., None]) & (row < (y + h)[..., None])  # [n, NUM_BLOCKS, rows]
    in_columns = (column >= x[..., None]) & (column < (x + w)[..., None])  # [n, NUM_BLOCKS, columns]
    inside = (in_rows[..., :, None] & in_columns[..., None, :]).flatten(2)  # [n, NUM_BLOCKS, L]
    return (inside * (NUM_BLOCKS - block)[None, :, None]).amax(dim=1)
