"""An encoder with a head, to be fine-tuned, probed and evaluated.

Parameter names are those of the authors' fine-tuned checkpoints: `fc_norm` before the head where patches are averaged,
`norm` where the class token is read.
"""

import torch
from torch import nn

from trainer.config import ClassifierConfig, EncoderConfig
from trainer.hashing import uniform
from trainer.vit import LAYER_NORM_EPS, ViT

DROP_STREAM = 51


class Encoder(ViT):
    """What pre-training leaves: its encoder, which now sees all patches."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.initialise()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8[n, 3, h, w] → the class token and the patches: [n, 1 + L, width]."""
        x = self.tokens(self.patchify(self.normalise(images)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Classifier(ViT):
    """A ViT that names classes. All patches are seen, and positions are trained."""

    drop_rates: torch.Tensor  # float32[depth]

    def __init__(self, config: ClassifierConfig, classes: int) -> None:
        super().__init__(config)
        self.pool = config.pool
        self.register_buffer(
            "drop_rates", torch.linspace(0, config.drop_path, config.depth), persistent=False
        )
        norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        if config.pool == "mean":
            self.fc_norm = norm
        else:
            self.norm = norm
        self.head = nn.Linear(config.width, classes)
        self.initialise()
        self.pos_embed.requires_grad_(True)

    def features(self, images: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Images (uint8[n, 3, h, w], or normalised floats) → what the head reads: [n, width].

        `kept`: see `kept_branches`; None: all of them.
        """
        x = self.tokens(self.patchify(self.normalise(images) if images.dtype == torch.uint8 else images))
        for i, block in enumerate(self.blocks):
            x = block(x, None if kept is None else kept[:, i])
        if self.pool == "mean":
            return self.fc_norm(x[:, 1:].mean(dim=1))
        return self.norm(x)[:, 0]

    def forward(self, images: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """→ logits [n, classes], in full precision: what is close should not become the same."""
        features = self.features(images, kept)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))

    def kept_branches(self, seed: int, epoch: int, sample_ids: torch.Tensor) -> torch.Tensor:
        """What each image's branches are multiplied with under drop path: 0, or 1 over the share that is kept. The rate
        grows from 0 at the first block to `drop_path` at the last. float32[n, depth, 2], a pure function of its
        arguments, on the device of `sample_ids` (int64[n])."""
        branch = torch.arange(2 * len(self.blocks), device=sample_ids.device)
        draw = uniform(seed, DROP_STREAM, epoch, sample_ids[:, None], branch)
        share = 1 - self.drop_rates.repeat_interleave(2)
        return ((draw < share) / share).view(len(sample_ids), -1, 2)
