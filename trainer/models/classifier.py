"""Encoder, and encoder with a classification head.

Parameter names are those of the authors' fine-tuned checkpoints: the last norm is `fc_norm` if the head reads the mean of
the patches, and `norm` if it reads the class token.
"""

import torch
from torch import nn

from trainer.config.model_schema import ClassifierConfig, EncoderConfig
from trainer.models.device_hashing import uniform
from trainer.models.vit import LAYER_NORM_EPS, ViT

DROP_STREAM = 51  # stream of the hash for stochastic depth


class Encoder(ViT):
    """The encoder of an MAE, applied to all patches."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.init_weights()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pixels [n, c, h, w] → the class token and the patches, [n, 1 + L, width]."""
        x = self.embed_patches(self.patchify(self.normalise(images)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Classifier(ViT):
    """An encoder with a linear head. The position embedding is trained, too."""

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
        self.init_weights()
        self.pos_embed.requires_grad_(True)

    def features(
        self,
        images: torch.Tensor,
        branch_scales: torch.Tensor | None = None,
        normalised: bool = False,
    ) -> torch.Tensor:
        """Compute the input of the head, [n, width].

        Args:
            images: pixels [n, c, h, w] of the model's type, or floats that are already normalised.
            branch_scales: float[n, depth, 2], see `drop_path_scales`. None: no stochastic depth.
            normalised: whether the images are already normalised, see `as_input`.
        """
        x = self.embed_patches(self.patchify(self.as_input(images, normalised)))
        for i, block in enumerate(self.blocks):
            x = block(x, None if branch_scales is None else branch_scales[:, i])
        if self.pool == "mean":
            return self.fc_norm(x[:, 1:].mean(dim=1))
        return self.norm(x)[:, 0]

    def forward(
        self,
        images: torch.Tensor,
        branch_scales: torch.Tensor | None = None,
        normalised: bool = False,
    ) -> torch.Tensor:
        """Classify images → logits [n, classes]; the arguments are those of `features`.

        The head runs in the precision of its weights, also under autocast: bf16 would make close logits equal.
        """
        features = self.features(images, branch_scales, normalised)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))

    def drop_path_scales(self, seed: int, epoch: int, sample_ids: torch.Tensor) -> torch.Tensor:
        """Draw the factors of each image's residual branches under stochastic depth.

        The drop rate grows linearly from 0 at the first block to `drop_path` at the last. A factor is 0 for a dropped
        branch, else 1 / (1 − rate). A pure function of its arguments.

        Args:
            sample_ids: int64[n].

        Returns float32[n, depth, 2] on the device of `sample_ids`.
        """
        branch = torch.arange(2 * len(self.blocks), device=sample_ids.device)
        draws = uniform(seed, DROP_STREAM, epoch, sample_ids[:, None], branch)
        keep_rate = 1 - self.drop_rates.repeat_interleave(2)
        return ((draws < keep_rate) / keep_rate).view(len(sample_ids), -1, 2)
