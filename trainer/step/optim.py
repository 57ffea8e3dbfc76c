"""Optimizers, their parameter groups, and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from trainer.config.optim_schema import AdamWConfig, LarsConfig, OptimConfig

TRUST = 0.001  # η of LARS: norm of an update over norm of its weights (You et al. 2017, arXiv 1708.03888)


def adamw(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """AdamW for pre-training. Weight decay applies to all but 1-D parameters, as in the authors' code; so class token and mask
    token are decayed. The learning rate is set at every step, see `learning_rate`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)


def layered_adamw(model: nn.Module, depth: int, config: AdamWConfig, layer_decay: float) -> torch.optim.AdamW:
    """AdamW for fine-tuning, as in the authors' FINETUNE.md.

    The learning rate of a layer is `layer_decay` times that of the layer above it: a group's "scale". Weight decay applies to
    all but 1-D parameters, the class token and the position embedding.

    Args:
        depth: number of the encoder's blocks.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** (depth + 1 - layer_of(name, depth))
        bare = parameter.ndim <= 1 or name in ("cls_token", "pos_embed")
        decay = 0.0 if bare else config.weight_decay
        group = {"params": [], "weight_decay": decay, "scale": scale}
        groups.setdefault((scale, decay), group)["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), lr=0.0, betas=(config.beta1, config.beta2), fused=True)


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter: 0 for the embeddings, 1 to `depth` for the blocks, depth + 1 for norm and head."""
    if name.startswith(("patch_embed", "cls_token", "pos_embed")):
        return 0
    if name.startswith("blocks."):
        return 1 + int(name.split(".")[1])
    return depth + 1


def learning_rate(
    step: int, total_steps: int, steps_per_epoch: int, global_batch: int, config: OptimConfig
) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up from 0, then half a cosine down to `min_lr`
    (paper, Table 8). The peak is blr · global batch / 256 (linear scaling rule, Goyal et al. 2017, arXiv 1706.02677)."""
    peak = config.blr * global_batch / 256
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class LARS(torch.optim.Optimizer):
    """SGD with momentum, where each weight matrix's update is scaled to norm TRUST · |weight| (You et al. 2017,
    arXiv 1708.03888). Biases and other 1-D parameters get plain SGD without weight decay, as in the authors' linear probing."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: LarsConfig) -> None:
        super().__init__(
            [p for p in parameters if p.requires_grad],
            {"lr": 0.0, "momentum": config.momentum, "weight_decay": config.weight_decay},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters that have a gradient. `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    weight, change = parameter.norm(), update.norm()
                    ratio = torch.where((weight > 0) & (change > 0), TRUST * weight / change, 1.0)
                    update = update * ratio
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(update)
                parameter.sub_(group["lr"] * state["momentum"])
