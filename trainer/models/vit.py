"""Vision Transformer blocks (Dosovitskiy et al. 2020, arXiv 2010.11929).

Parameter names are those of the MAE authors' checkpoints.

Shapes in this package: n images of c channels, L patches per image, K visible patches per image, p pixels per side of a patch.
"""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.config.model_schema import EncoderConfig

LAYER_NORM_EPS = 1e-6  # the authors' models_mae.py
# Mean and standard deviation of ImageNet's pixels, RGB in [0, 1] (the authors' main_pretrain.py).
# `EncoderConfig.pixel_mean` and `pixel_std` are None where these are used.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Largest value of each integer type of pixels: they are divided by it.
PIXEL_SCALES = {torch.uint8: 255, torch.uint16: 65535}


class PatchEmbed(nn.Module):
    """Linear embedding of flattened patches.

    The weight has the shape of a convolution, as in published checkpoints. It is applied to patches that were
    already cut out of the image, so that masked patches cost nothing.
    """

    def __init__(self, patch_size: int, width: int, channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Embed patches [n, l, p · p · c], flattened as (row, column, channel) → [n, l, width]."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, tokens, width] → [n, tokens, width]."""
        n, tokens, width = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with GELU; the hidden layer is 4 · width wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, tokens, width] → [n, tokens, width]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor, branch_scales: torch.Tensor | None = None) -> torch.Tensor:
        """[n, tokens, width] → [n, tokens, width].

        Args:
            branch_scales: float[n, 2], factors of each image's attention and MLP branch, for stochastic depth
                (Huang et al. 2016, arXiv 1603.09382). None: 1.
        """
        attention = self.attn(self.norm1(x))
        x = x + (attention if branch_scales is None else attention * branch_scales[:, :1, None])
        mlp = self.mlp(self.norm2(x))
        return x + (mlp if branch_scales is None else mlp * branch_scales[:, 1:, None])


class ViT(nn.Module):
    """Base class of all models: image normalisation, patches, embeddings and the encoder's blocks."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.heads = config.heads
        self.grid = config.grid
        self.num_patches = config.num_patches
        width = config.width
        self.channels = config.channels
        self.pixel_dtype = config.pixel_dtype
        self.patch_embed = PatchEmbed(config.patch_size, width, config.channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_pos_embed(width, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        mean, std = pixel_statistics(config)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def init_weights(self) -> None:
        """Initialise as in the paper, appendix A.1: xavier_uniform for linear layers, and for the patch embedding as the
        linear layer that it is; N(0, 0.02²) for the class token."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(len(self.patch_embed.proj.weight), -1))
        nn.init.normal_(self.cls_token, std=0.02)

    def scale(self, images: torch.Tensor) -> torch.Tensor:
        """Convert pixels to floats of the model's dtype: integers to [0, 1], floats as they are."""
        floats = images.to(self.pixel_mean.dtype)
        return floats if images.is_floating_point() else floats / PIXEL_SCALES[images.dtype]

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise pixels, uint8, uint16 or floats [n, c, h, w], by the model's mean and standard deviation of each channel →
        floats of the model's dtype."""
        return (self.scale(images) - self.pixel_mean) / self.pixel_std

    def as_input(self, images: torch.Tensor, normalised: bool = False) -> torch.Tensor:
        """Normalise images unless they are normalised already.

        They are if `normalised` says so, and also if they are floats and the model was made for integer pixels.
        """
        if normalised or (images.is_floating_point() and self.pixel_dtype != "float32"):
            return images
        return self.normalise(images)

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """Cut images [n, c, h, w] into patches [n, L, p · p · c], flattened as (row, column, channel)."""
        p, c = self.patch_size, self.channels
        n, _, h, w = images.shape
        return images.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """Assemble images [n, c, h, w] from patches [n, L, p · p · c]; the inverse of `patchify`."""
        p, c, (rows, columns) = self.patch_size, self.channels, self.grid
        image = patches.view(-1, rows, columns, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, c, rows * p, columns * p)

    def embed_patches(self, patches: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Embed patches, add positions, and prepend the class token.

        Args:
            patches: [n, L, p · p · c].
            visible: int64[n, K], the patches to embed. None: all.

        Returns [n, 1 + K, width].
        """
        # `len(patches)` would make the batch size a constant in exported programs.
        positions = self.pos_embed[:, 1:].expand(patches.shape[0], -1, -1)
        if visible is not None:
            patches, positions = gather_patches(patches, visible), gather_patches(positions, visible)
        x = self.patch_embed(patches) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls, x], dim=1)


def pixel_statistics(config: EncoderConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel by which a model normalises: the config's, or ImageNet's.

    A model of other than 3 channels that has none does not normalise.
    """
    if config.pixel_mean is not None and config.pixel_std is not None:
        return config.pixel_mean, config.pixel_std
    return (MEAN, STD) if config.channels == 3 else ((0.0,) * config.channels, (1.0,) * config.channels)


def gather_patches(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Select rows of x [n, l, c] by indices int64[n, k] → [n, k, c]."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def sincos_pos_embed(width: int, grid: tuple[int, int]) -> torch.Tensor:
    """Compute fixed 2-D sin-cos position embeddings (the authors' util/pos_embed.py).

    The first half of the channels encodes the column, the second half the row. Each half is sines, then cosines, of
    the position over 10000^(i / (width / 4)) (Vaswani et al. 2017, section 3.5, over two axes).

    Args:
        width: embedding dimension, divisible by 4.
        grid: rows and columns of patches.

    Returns float32[1, 1 + rows · columns, width]; the class token's row is zero.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(max(grid), dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [longer side, width / 2]
    rows, columns = grid
    column = axis[None, :columns, :].expand(rows, columns, -1)
    row = axis[:rows, None, :].expand(rows, columns, -1)
    patches = torch.cat([column, row], dim=-1).reshape(rows * columns, width)
    return torch.cat([torch.zeros(1, width), patches.float()])[None]
