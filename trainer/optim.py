"""The optimizer's parameter groups, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from trainer.config import OptimConfig


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW that decays everything but biases and 1-D parameters, as the authors' code groups them (so the
    class and mask tokens are decayed). The learning rate is set every step, see `learning_rate`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(
    step: int, total_steps: int, steps_per_epoch: int, global_batch: int, config: OptimConfig
) -> float:
    """Linear warm-up from 0, then half a cosine to `min_lr`, at every step (paper, Table 8).

    The peak is blr · global batch / 256 (the linear rule of Goyal et al. 2017).
    """
    peak = config.blr * global_batch / 256
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
