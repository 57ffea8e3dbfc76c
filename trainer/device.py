"""Where a model runs, in which precision, and whether it is compiled."""

import os
import shutil
from collections.abc import Callable
from typing import Protocol

import torch

from pipeline.errors import UserError
from trainer.config import RunConfig


def best_device() -> torch.device:
    """A GPU, where this process has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Precise(Protocol):
    """What says in which precision it is computed: a run's config, or what is known of a model."""

    @property
    def precision(self) -> str: ...


def autocast(config: Precise, device: torch.device) -> torch.autocast:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def in_precision(
    says: Callable[[torch.Tensor], torch.Tensor], config: Precise, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a model says of images, as it would in training."""

    def says_so(images: torch.Tensor) -> torch.Tensor:
        with autocast(config, device):
            return says(images)

    return says_so


def dtype_of(config: RunConfig) -> torch.dtype:
    """Of weights."""
    return torch.float64 if config.precision == "float64" else torch.float32


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether what is trained is compiled (torch.compile). Its cache is on the node's own disk, TORCHINDUCTOR_CACHE_DIR, where
    the next attempt finds it. UserError where it is asked for and there is no compiler."""
    if device.type == "cuda":
        return config.compile != "never"
    if config.compile == "always" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError(
            "compile=always needs a C++ compiler on a CPU, g++ or what CXX names: compile=auto does without"
        )
    return config.compile == "always"
