"""Vision Transformer blocks (Dosovitskiy et al. 2020, arXiv 2010.11929), with the parameter names that
the MAE authors' checkpoints use."""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.config import EncoderConfig

LAYER_NORM_EPS = 1e-6
# Pixel statistics of ImageNet, of values in [0, 1] (as every ImageNet recipe).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class PatchEmbed(nn.Module):
    """A linear map of flattened patches.

    Its weight has the shape of a convolution, as in published checkpoints; here it is applied to patches
    that were cut out already, so that masked ones cost nothing.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[n, l, p · p · 3], each patch as (row, column, colour) → [n, l, width]."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, tokens, width] → the same."""
        n, tokens, width = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """[n, tokens, width] → the same. `kept`: [n, 2], what each image's two branches are multiplied with, if not 1:
        stochastic depth (Huang et al. 2016, arXiv 1603.09382)."""
        attention = self.attn(self.norm1(x))
        x = x + (attention if kept is None else attention * kept[:, :1, None])
        mlp = self.mlp(self.norm2(x))
        return x + (mlp if kept is None else mlp * kept[:, 1:, None])


class ViT(nn.Module):
    """What all models here have: how an image becomes tokens, and the encoder's blocks.

    Shapes: n images, L patches an image, K of them seen, p pixels a patch's side.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.heads = config.heads
        self.grid = config.grid
        self.patches = config.patches
        width = config.width
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.register_buffer("pixel_mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def initialise(self) -> None:
        """Paper, appendix A.1: xavier_uniform everywhere; the patch embedding as the linear map it is."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(len(self.patch_embed.proj.weight), -1))
        nn.init.normal_(self.cls_token, std=0.02)

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
        p, (rows, columns) = self.patch_size, self.grid
        image = patches.view(-1, rows, columns, p, p, 3).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, 3, rows * p, columns * p)

    def tokens(self, patches: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Patches [n, L, p · p · 3], all of them or those at `seen` [n, K] → [n, 1 + K, width], positions added."""
        positions = self.pos_embed[:, 1:].expand(patches.shape[0], -1, -1)  # `len` would fix it in exports
        if seen is not None:
            patches, positions = take(patches, seen), take(positions, seen)
        x = self.patch_embed(patches) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls, x], dim=1)


def take(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of x [n, l, c] at indices [n, k] → [n, k, c]."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def sincos_positions(width: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed 2-D sin-cos positions of a grid (rows, columns): float32[1, 1 + rows · columns, width], the class token's all
    zeros.

    The first half of the channels tells the column, the second the row; each half is sines, then cosines,
    of the position over 10000^(i / (width / 4)) (Vaswani et al. 2017, section 3.5, over two axes).
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(max(grid), dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [longer side, width / 2]
    rows, columns = grid
    column = axis[None, :columns, :].expand(rows, columns, -1)
    row = axis[:rows, None, :].expand(rows, columns, -1)
    patches = torch.cat([column, row], dim=-1).reshape(rows * columns, width)
    return torch.cat([torch.zeros(1, width), patches.float()])[None]
