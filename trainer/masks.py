"""Which patches are masked: a hash of (seed, epoch, sample id, patch), computed on the device."""

import math

import torch

from trainer.config import ModelConfig
from trainer.hashing import hash64, uniform

MASK_STREAM, BLOCK_STREAM = 21, 22
BLOCKS = 64  # tried for each image, until enough is masked
LEAST_BLOCK = 16  # patches (Bao et al. 2021, arXiv 2106.08254, algorithm 1)
BLOCK_RATIO = 0.3  # height over width, least


def noise_of(config: ModelConfig, seed: int, epoch: int, sample_ids: torch.Tensor) -> torch.Tensor:
    """Noise whose smallest values are the patches to keep, as the config samples them (paper, Table 1f): int64[n, L], on
    the device of `sample_ids` (int64[n])."""
    noise = mask_noise(seed, epoch, sample_ids, config.patches)
    if config.sampling == "random":
        return noise
    if config.sampling == "grid":
        last = _grid(*config.grid, noise.device)
    else:
        last = _blocks(*config.grid, seed, epoch, sample_ids)
    # Above all it says who is masked, below that chance does.
    return last * 2**40 + (noise >> 24 & 2**40 - 1)


def mask_noise(seed: int, epoch: int, sample_ids: torch.Tensor, patches: int) -> torch.Tensor:
    """Noise whose smallest values are the patches to keep, any patches.

    Args:
        sample_ids: int64[n].
        patches: L, patches an image.

    Returns int64[n, L], on the device of `sample_ids`.
    """
    patch = torch.arange(patches, device=sample_ids.device)
    return hash64(seed, MASK_STREAM, epoch, sample_ids[:, None], patch[None, :])


def _grid(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """0 for one of four patches, in a regular grid, 1 for the others: int64[1, L]."""
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return ((row[:, None] % 2 + column[None, :] % 2) > 0).long().reshape(1, -1)


def _blocks(rows: int, columns: int, seed: int, epoch: int, sample_ids: torch.Tensor) -> torch.Tensor:
    """Blocks of patches are masked one after another, as BEiT does: how early each patch is, int64[n, L], 0 for never."""
    block = torch.arange(BLOCKS, device=sample_ids.device)
    draw = [
        uniform(seed, BLOCK_STREAM, epoch, sample_ids[:, None], block, k) for k in range(4)
    ]  # [n, BLOCKS]
    most = max(rows * columns // 3, LEAST_BLOCK)
    area = LEAST_BLOCK + (most - LEAST_BLOCK) * draw[0]
    ratio = torch.exp(math.log(BLOCK_RATIO) * (1 - 2 * draw[1]))
    h = (area * ratio).sqrt().round().clamp(1, rows)
    w = (area / ratio).sqrt().round().clamp(1, columns)
    y, x = (draw[2] * (rows - h + 1)).floor(), (draw[3] * (columns - w + 1)).floor()
    row, column = (
        torch.arange(rows, device=sample_ids.device),
        torch.arange(columns, device=sample_ids.device),
    )
    high = (row >= y[..., None]) & (row < (y + h)[..., None])  # [n, BLOCKS, rows]
    wide = (column >= x[..., None]) & (column < (x + w)[..., None])  # [n, BLOCKS, columns]
    inside = (high[..., :, None] & wide[..., None, :]).flatten(2)  # [n, BLOCKS, L]
    return (inside * (BLOCKS - block)[None, :, None]).amax(dim=1)
