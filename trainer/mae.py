"""The Masked Autoencoder of He et al. 2021 (arXiv 2111.06377): the model, and nothing else.

Shapes: n images, L patches an image, K of them kept, p pixels a patch's side.
"""

from typing import NamedTuple

import torch
from torch import nn

from trainer.config import ModelConfig
from trainer.hashing import normal
from trainer.vit import LAYER_NORM_EPS, Block, ViT, sincos_positions, take


class Masking(NamedTuple):
    keep: torch.Tensor  # int64[n, K], kept patches in their shuffled order
    masked: torch.Tensor  # int64[n, L − K]
    restore: torch.Tensor  # int64[n, L]: where each patch went in the shuffle


class MAE(ViT):
    """Parameter names are the authors', so that their checkpoints load."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        self.kept = config.kept
        width, decoder_width = config.width, config.decoder_width

        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(width, decoder_width)
        of_mask = width if config.masked == "token" else decoder_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, of_mask), requires_grad=config.masked != "noise")
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_width, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_width, config.patch_size**2 * 3)
        self.initialise()
        nn.init.normal_(self.mask_token, std=0.02)

    def masking(self, noise: torch.Tensor) -> Masking:
        """The K patches with the smallest noise ([n, L], any ordered dtype) are kept."""
        shuffle = noise.argsort(dim=1, stable=True)
        return Masking(shuffle[:, : self.kept], shuffle[:, self.kept :], shuffle.argsort(dim=1))

    def encode(self, patches: torch.Tensor, masking: Masking, noise: torch.Tensor) -> torch.Tensor:
        """Patches [n, L, p · p · 3], of which the kept are seen → [n, 1 + K, width]; or, in the paper's studies, all of
        them, the masked as mask tokens, or all under N(0, 1) noise → [n, 1 + L, width]."""
        if self.config.masked == "nothing":
            x = self.tokens(patches, masking.keep)
        elif self.config.masked == "token":
            x = self.tokens(patches)
            hidden = (masking.restore >= self.kept)[..., None]
            masked = (self.mask_token + self.pos_embed[:, 1:]).to(x.dtype)
            x = torch.cat([x[:, :1], torch.where(hidden, masked, x[:, 1:])], dim=1)
        else:
            place = torch.arange(patches.shape[2], device=noise.device)
            x = self.tokens(patches + normal(noise[..., None], place).to(patches))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent: torch.Tensor, restore: torch.Tensor) -> torch.Tensor:
        """Latent, see `encode`, → decoder tokens of all patches, in place: [n, L, decoder_width]."""
        x = self.decoder_embed(latent)
        if self.config.masked == "nothing":
            masked = self.mask_token.expand(len(x), self.patches - self.kept, -1)
            x = torch.cat([x[:, :1], take(torch.cat([x[:, 1:], masked.to(x.dtype)], dim=1), restore)], dim=1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, 1:]

    def target(self, patches: torch.Tensor) -> torch.Tensor:
        """What is predicted of each patch: its pixels, normalised by its own mean and (unbiased) variance
        if `norm_pix` (section 4.1, "reconstruction target")."""
        if not self.config.norm_pix:
            return patches
        mean = patches.mean(dim=-1, keepdim=True)
        variance = patches.var(dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The loss of each image, its mean squared error over masked patches: [n].

        Args:
            images: uint8[n, 3, h, w], or such floats already normalised.
            noise: [n, L], see `masking`.
        """
        patches = self.patchify(self.normalise(images) if images.dtype == torch.uint8 else images)
        masking = self.masking(noise)
        tokens = self.decode(self.encode(patches, masking, noise), masking.restore)
        if self.config.masked == "noise":
            return (self.decoder_pred(tokens) - self.target(patches)).square().mean(dim=(1, 2))
        prediction = self.decoder_pred(take(tokens, masking.masked))  # of masked patches only
        target = self.target(take(patches, masking.masked))
        return (prediction - target).square().mean(dim=(1, 2))

    def predict(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every patch predicted, in target space: [n, L, p · p · 3]; and which are masked: bool[n, L]."""
        patches = self.patchify(self.normalise(images) if images.dtype == torch.uint8 else images)
        masking = self.masking(noise)
        prediction = self.decoder_pred(self.decode(self.encode(patches, masking, noise), masking.restore))
        return prediction, masking.restore >= self.kept
