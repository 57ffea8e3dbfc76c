"""Linear probe: a linear classifier on a frozen encoder (paper, appendix A.1, Table 10)."""

import torch
from torch import nn

from trainer.config.schema import LinprobeConfig
from trainer.models.classifier import Encoder

HEAD_STD = 0.01  # the authors' main_linprobe.py
NORM_EPS = 1e-6  # the authors' main_linprobe.py
NORM_MOMENTUM = 0.1  # torch's default: weight of the newest batch in the running statistics


class Probe(nn.Module):
    """A frozen encoder, BatchNorm without affine parameters, and a linear layer.

    The norm and the linear layer are `head.0` and `head.1` in the authors' checkpoints.
    """

    def __init__(self, config: LinprobeConfig, classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(config.model).requires_grad_(False)
        self.norm = nn.BatchNorm1d(config.model.width, eps=NORM_EPS, momentum=NORM_MOMENTUM, affine=False)
        self.linear = nn.Linear(config.model.width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=HEAD_STD)
        nn.init.zeros_(self.linear.bias)
        # Training computes the statistics over all workers itself, see `trainer.train.linprobe`; here they are only read.
        self.norm.eval()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pixels [n, c, h, w] → the class token, float[n, width]."""
        return self.encoder(images)[:, 0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify pixels [n, c, h, w] with the running statistics → logits [n, classes].

        The norm and the linear layer run in the precision of their weights, also under autocast.
        """
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.linear(self.norm(features.to(self.linear.weight.dtype)))
