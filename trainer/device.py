"""Where a model runs, and in which precision."""

from collections.abc import Callable

import torch

from trainer.config import RunConfig


def best_device() -> torch.device:
    """A GPU, where this process has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def in_precision(
    says: Callable[[torch.Tensor], torch.Tensor], config: RunConfig, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a model says of images, as it would in training."""

    def says_so(images: torch.Tensor) -> torch.Tensor:
        with autocast(config, device):
            return says(images)

    return says_so


def dtype_of(config: RunConfig) -> torch.dtype:
    """Of weights."""
    return torch.float64 if config.precision == "float64" else torch.float32
