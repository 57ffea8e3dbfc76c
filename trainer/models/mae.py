"""The Masked Autoencoder of He et al. 2021 (arXiv 2111.06377).

Shapes: n images of c channels, L patches per image, K visible patches per image, p pixels per side of a patch.
"""

from typing import NamedTuple

import torch
from torch import nn

from trainer.config.model_schema import ModelConfig
from trainer.models.device_hashing import normal
from trainer.models.vit import LAYER_NORM_EPS, Block, ViT, gather_patches, sincos_pos_embed


class Masking(NamedTuple):
    """Visible and masked patches of each image, as indices into its L patches."""

    visible: torch.Tensor  # int64[n, K], in shuffled order
    masked: torch.Tensor  # int64[n, L − K], in shuffled order
    restore: torch.Tensor  # int64[n, L]: position of each patch in (visible, masked)


class MAE(ViT):
    """Masked autoencoder. Parameter names are the authors', so that their checkpoints load."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        self.num_visible = config.num_visible
        width, decoder_width = config.width, config.decoder_width

        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(width, decoder_width)
        # With masked=token the token is an input of the encoder; with masked=noise there is none.
        token_width = width if config.masked == "token" else decoder_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, token_width), requires_grad=config.masked != "noise")
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder_width, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_width, config.patch_size**2 * config.channels)
        self.init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def select_patches(self, noise: torch.Tensor) -> Masking:
        """Make the K patches with the smallest noise ([n, L], any ordered dtype) visible, and mask the others."""
        shuffle = noise.argsort(dim=1, stable=True)
        visible, masked = shuffle[:, : self.num_visible], shuffle[:, self.num_visible :]
        return Masking(visible, masked, restore=shuffle.argsort(dim=1))

    def encode(self, patches: torch.Tensor, masking: Masking, noise: torch.Tensor) -> torch.Tensor:
        """Encode patches [n, L, p · p · c].

        Returns [n, 1 + K, width], the class token and the visible patches in shuffled order; or, in two of the
        paper's ablations, [n, 1 + L, width], all patches in their order: with mask tokens at the masked ones
        (masked=token), or with N(0, 1) noise added to all of them (masked=noise; `noise` seeds it).
        """
        if self.config.masked == "nothing":
            x = self.embed_patches(patches, masking.visible)
        elif self.config.masked == "token":
            x = self.embed_patches(patches)
            is_masked = (masking.restore >= self.num_visible)[..., None]
            tokens = (self.mask_token + self.pos_embed[:, 1:]).to(x.dtype)
            x = torch.cat([x[:, :1], torch.where(is_masked, tokens, x[:, 1:])], dim=1)
        else:
            pixel = torch.arange(patches.shape[2], device=noise.device)
            x = self.embed_patches(patches + normal(noise[..., None], pixel).to(patches))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent: torch.Tensor, restore: torch.Tensor) -> torch.Tensor:
        """Decode the output of `encode` → decoder tokens of all patches in their order, [n, L, decoder_width]."""
        x = self.decoder_embed(latent)
        if self.config.masked == "nothing":
            tokens = self.mask_token.expand(len(x), self.num_patches - self.num_visible, -1)
            shuffled = torch.cat([x[:, 1:], tokens.to(x.dtype)], dim=1)
            x = torch.cat([x[:, :1], gather_patches(shuffled, restore)], dim=1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, 1:]

    def target(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the target of each patch, [n, L, p · p · c]: its pixels, normalised by its own mean and unbiased
        variance if `norm_pix` (paper, section 3; the authors' models_mae.py)."""
        if not self.config.norm_pix:
            return patches
        mean = patches.mean(dim=-1, keepdim=True)
        variance = patches.var(dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Compute the loss of each image: the mean squared error over its masked patches (over all for masked=noise).

        Args:
            images: pixels [n, c, h, w] of the model's type, or floats that are already normalised, see `as_input`.
            noise: [n, L], which patches are masked, see `select_patches`.

        Returns float[n].
        """
        patches = self.patchify(self.as_input(images))
        masking = self.select_patches(noise)
        tokens = self.decode(self.encode(patches, masking, noise), masking.restore)
        if self.config.masked == "noise":
            return (self.decoder_pred(tokens) - self.target(patches)).square().mean(dim=(1, 2))
        # Visible patches have no part in the loss, so they are not predicted.
        prediction = self.decoder_pred(gather_patches(tokens, masking.masked))
        target = self.target(gather_patches(patches, masking.masked))
        return (prediction - target).square().mean(dim=(1, 2))

    def predict(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict all patches; the arguments are those of `forward`.

        Returns predictions in target space, [n, L, p · p · c], and which patches are masked, bool[n, L].
        """
        patches = self.patchify(self.as_input(images))
        masking = self.select_patches(noise)
        prediction = self.decoder_pred(self.decode(self.encode(patches, masking, noise), masking.restore))
        return prediction, masking.restore >= self.num_visible
