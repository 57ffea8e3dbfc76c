"""A straightforward MAE and training loop, written from the paper and trained as was usual when it appeared: eager fp16 with
loss scaling, explicit attention, all patches embedded and predicted, and the loss read at each step.

It shares no code with trainer/, and is the baseline of `benchmarks.step`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from trainer.config.model_schema import ModelConfig


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x))


class PlainMAE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_visible, self.patch = config.num_visible, config.patch_size
        width, narrow, patches = config.width, config.decoder_width, config.num_patches
        self.embed = nn.Conv2d(3, width, self.patch, self.patch)
        self.cls, self.mask = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 1, narrow))
        self.register_buffer("positions", torch.randn(1, patches, width))
        self.register_buffer("decoder_positions", torch.randn(1, 1 + patches, narrow))
        self.encoder = nn.Sequential(*(Block(width, config.heads) for _ in range(config.depth)))
        self.norm, self.narrow = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, narrow)
        self.decoder = nn.Sequential(
            *(Block(narrow, config.decoder_heads) for _ in range(config.decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(narrow, eps=1e-6)
        self.predict = nn.Linear(narrow, 3 * self.patch**2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The mean loss over masked patches of normalised images, float[n, 3, h, w]."""
        n = len(images)
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        order = torch.rand(n, x.shape[1], device=x.device).argsort(dim=1)
        place = order.argsort(dim=1)
        x = x.gather(1, order[:, : self.num_visible, None].expand(-1, -1, x.shape[2]))
        x = self.narrow(self.norm(self.encoder(torch.cat([self.cls.expand(n, -1, -1), x], dim=1))))
        tokens = torch.cat([x[:, 1:], self.mask.expand(n, place.shape[1] - self.num_visible, -1)], dim=1)
        tokens = tokens.gather(1, place[..., None].expand(-1, -1, tokens.shape[2]))
        x = self.decoder(torch.cat([x[:, :1], tokens], dim=1) + self.decoder_positions)
        prediction = self.predict(self.decoder_norm(x))[:, 1:]
        target = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        target = (target - target.mean(dim=-1, keepdim=True)) / (
            target.var(dim=-1, keepdim=True) + 1e-6
        ).sqrt()
        loss = (prediction - target).square().mean(dim=-1)
        masked = (place >= self.num_visible).float()
        return (loss * masked).sum() / masked.sum()


class PlainLoop:
    """Trains a `PlainMAE` with autocast to `precision` and loss scaling. Each step reads the loss and computes the gradient
    norm."""

    def __init__(self, config: ModelConfig, precision: torch.dtype, device: torch.device) -> None:
        self.model = PlainMAE(config).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
        self.device, self.precision = device, precision

    def step(self, images: torch.Tensor) -> float:
        lowered = self.precision is not torch.float32
        with torch.autocast(self.device.type, self.precision if lowered else torch.bfloat16, enabled=lowered):
            loss = self.model(images)
        value = loss.item()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return value
