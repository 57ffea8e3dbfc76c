"""The Masked Autoencoder of He et al. 2021 (arXiv 2111.06377): the model, and nothing else.

Shapes: n images, L patches an image, K of them kept, p pixels a patch's side.
"""

from typing import NamedTuple

import torch
from torch import nn

from trainer.config import ModelConfig
from trainer.vit import LAYER_NORM_EPS, Block, PatchEmbed, sincos_positions

# Pixel statistics of ImageNet, of values in [0, 1] (as every ImageNet recipe).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Masking(NamedTuple):
    keep: torch.Tensor  # int64[n, K], kept patches in their shuffled order
    masked: torch.Tensor  # int64[n, L − K]
    restore: torch.Tensor  # int64[n, L]: where each patch went in the shuffle


class MAE(nn.Module):
    """Parameter names are the authors', so that their checkpoints load."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size
        self.patches, self.kept = config.patches, config.kept
        width, decoder_width = config.width, config.decoder_width

        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_width, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_width, config.patch_size**2 * 3)

        self.register_buffer("pixel_mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        # Paper, appendix A.1: xavier_uniform everywhere; the patch embedding as the linear map it is.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8[n, 3, h, w] → ImageNet-normalised floats of the model's dtype."""
        return (images.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, h, w] → [n, L, p · p · 3], each patch as (row, column, colour)."""
        p = self.patch_size
        n, _, h, w = images.shape
        return images.view(n, 3, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * 3)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """The inverse of `patchify`."""
        p, g = self.patch_size, self.grid
        return patches.view(-1, g, g, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, g * p, g * p)

    def masking(self, noise: torch.Tensor) -> Masking:
        """The K patches with the smallest noise ([n, L], any ordered dtype) are kept."""
        shuffle = noise.argsort(dim=1, stable=True)
        return Masking(shuffle[:, : self.kept], shuffle[:, self.kept :], shuffle.argsort(dim=1))

    def encode(self, patches: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Patches [n, L, p · p · 3], of which those at `keep` [n, K] are seen → [n, 1 + K, width]."""
        x = self.patch_embed(_take(patches, keep)) + _take(
            self.pos_embed[:, 1:].expand(len(keep), -1, -1), keep
        )
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent: torch.Tensor, restore: torch.Tensor) -> torch.Tensor:
        """Latent [n, 1 + K, width] → decoder tokens of all patches, in place: [n, L, decoder_width]."""
        x = self.decoder_embed(latent)
        masked = self.mask_token.expand(len(x), self.patches - self.kept, -1)
        x = torch.cat([x[:, :1], _take(torch.cat([x[:, 1:], masked.to(x.dtype)], dim=1), restore)], dim=1)
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
            images: uint8[n, 3, image_size, image_size], or such floats already normalised.
            noise: [n, L], see `masking`.
        """
        patches = self.patchify(self.normalise(images) if images.dtype == torch.uint8 else images)
        masking = self.masking(noise)
        tokens = self.decode(self.encode(patches, masking.keep), masking.restore)
        prediction = self.decoder_pred(_take(tokens, masking.masked))  # of masked patches only
        target = self.target(_take(patches, masking.masked))
        return (prediction - target).square().mean(dim=(1, 2))

    def predict(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every patch predicted, in target space: [n, L, p · p · 3]; and which are masked: bool[n, L]."""
        patches = self.patchify(self.normalise(images) if images.dtype == torch.uint8 else images)
        masking = self.masking(noise)
        prediction = self.decoder_pred(self.decode(self.encode(patches, masking.keep), masking.restore))
        return prediction, masking.restore >= self.kept


def _take(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of x [n, l, c] at indices [n, k] → [n, k, c]."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))
