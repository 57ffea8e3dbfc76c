"""Device, precision and compilation of a model."""

import os
import shutil
from collections.abc import Callable
from typing import Protocol

import torch

from pipeline.errors import UserError
from trainer.config.schema import RunConfig


def best_device() -> torch.device:
    """Return the GPU if this process has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class HasPrecision(Protocol):
    """Anything with a `precision` of "auto", "bf16", "float32" or "float64", such as a run's config."""

    @property
    def precision(self) -> str: ...


def autocast(config: HasPrecision, device: torch.device) -> torch.autocast:
    """Return bf16 autocast, enabled if `precision` is bf16, or auto on a GPU."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def with_autocast(
    forward: Callable[[torch.Tensor], torch.Tensor], config: HasPrecision, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Wrap a model's forward function so that it runs in the precision of training."""

    def wrapped(images: torch.Tensor) -> torch.Tensor:
        with autocast(config, device):
            return forward(images)

    return wrapped


def weight_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype of the weights: float64 if the precision is float64, else float32."""
    return torch.float64 if config.precision == "float64" else torch.float32


def should_compile(config: RunConfig, device: torch.device) -> bool:
    """Return whether the trained model is compiled with torch.compile.

    The compile cache (TORCHINDUCTOR_CACHE_DIR) is on the node's own disk, so the next attempt reuses it.
    Raises UserError if compile=always on a CPU without a C++ compiler.
    """
    if device.type == "cuda":
        return config.compile != "never"
    if config.compile == "always" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError(
            "compile=always needs a C++ compiler on a CPU: install g++, set CXX to a compiler, or use compile=auto"
        )
    return config.compile == "always"
