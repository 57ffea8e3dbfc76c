"""Vision Transformer blocks (Dosovitskiy et al. 2020, arXiv 2010.11929).

Parameter names are those of the MAE authors' checkpoints.

Shapes in this package: n images, L patches per image, K visible patches per image, p pixels per side of a patch.
"""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.config.model_schema import EncoderConfig

LAYER_NORM_EPS = 1e-6  # the authors' models_mae.py
# Mean and standard deviation of ImageNet's pixels, RGB in [0, 1] (the authors' main_pretrain.py).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class PatchEmbed(nn.Module):
    """Linear embedding of flattened patches.

    The weight has the shape of a convolution, as in published checkpoints. It is applied to patches that were
    already cut out of the image, so that masked patches cost nothing.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Embed patches [n, l, p · p · 3], flattened as (row, column, colour) → [n, l, width]."""
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
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_pos_embed(width, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.register_buffer("pixel_mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def init_weights(self) -> None:
        """Initialise as in the paper, appendix A.1: xavier_uniform for linear layers, and for the patch embedding as the
        linear layer that it is; N(0, 0.02²) for the class token."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(len(self.patch_embed.proj.weight), -1))
        nn.init.normal_(self.cls_token, std=0.02)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise uint8[n, 3, h, w] by ImageNet's mean and standard deviation → floats of the model's dtype."""
        return (images.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """Cut images [n, 3, h, w] into patches [n, L, p · p · 3], flattened as (row, column, colour)."""
        p = self.patch_size
        n, _, h, w = images.shape
        return images.view(n, 3, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * 3)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """Assemble images [n, 3, h, w] from patches [n, L, p · p · 3]; the inverse of `patchify`."""
        p, (rows, columns) = self.patch_size, self.grid
        image = patches.view(-1, rows, columns, p, p, 3).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, 3, rows * p, columns * p)

    def embed_patches(self, patches: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Embed patches, add positions, and prepend the class token.

        Args:
            patches: [n, L, p · p · 3].
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
