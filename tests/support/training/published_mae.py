"""Files in the layouts of the MAE authors' checkpoints, by names and shapes; and what those layouts mean, in plain torch."""

import torch
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]
SIZES = {
    "base": (768, 12, 12, 16),
    "large": (1024, 24, 16, 16),
    "huge": (1280, 32, 16, 14),
}  # width, depth, heads, patch
EPS = 1e-6


def block_shapes(stack: str, depth: int, w: int) -> Shapes:
    layers = {
        "norm1": (w,),
        "attn.qkv": (3 * w, w),
        "attn.proj": (w, w),
        "norm2": (w,),
        "mlp.fc1": (4 * w, w),
        "mlp.fc2": (w, 4 * w),
    }
    table: Shapes = {}
    for i in range(depth):
        for layer, shape in layers.items():
            table |= {f"{stack}.{i}.{layer}.weight": shape, f"{stack}.{i}.{layer}.bias": shape[:1]}
    return table


def shapes(
    kind: str, w: int, depth: int, patch: int, image: int = 224, d: int = 512, d_depth: int = 8
) -> Shapes:
    """Of mae_pretrain_vit_* ("pretrain", the encoder alone), mae_visualize_vit_* ("visualize"), mae_finetuned_vit_*
    ("finetuned")."""
    tokens = (image // patch) ** 2 + 1
    table: Shapes = {
        "cls_token": (1, 1, w),
        "pos_embed": (1, tokens, w),
        "patch_embed.proj.weight": (w, 3, patch, patch),
        "patch_embed.proj.bias": (w,),
        **block_shapes("blocks", depth, w),
    }
    if kind == "finetuned":
        names = {"fc_norm": (w,), "head": (1000, w)}
        bias = {"fc_norm.bias": (w,), "head.bias": (1000,)}
        return table | {f"{name}.weight": shape for name, shape in names.items()} | bias
    table |= {"norm.weight": (w,), "norm.bias": (w,)}
    if kind == "visualize":
        table |= {
            "mask_token": (1, 1, d),
            "decoder_pos_embed": (1, tokens, d),
            "decoder_embed.weight": (d, w),
            "decoder_embed.bias": (d,),
            **block_shapes("decoder_blocks", d_depth, d),
            "decoder_norm.weight": (d,),
            "decoder_norm.bias": (d,),
            "decoder_pred.weight": (patch * patch * 3, d),
            "decoder_pred.bias": (patch * patch * 3,),
        }
    return table


def random_weights(table: Shapes) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: 0.05 * torch.randn(shape) for name, shape in table.items()}


def run_blocks(weights: dict[str, torch.Tensor], stack: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    for i in range(sum(name.startswith(f"{stack}.") and name.endswith("norm1.bias") for name in weights)):

        def of(layer: str, i: int = i) -> tuple[torch.Tensor, torch.Tensor]:
            return weights[f"{stack}.{i}.{layer}.weight"], weights[f"{stack}.{i}.{layer}.bias"]

        n, tokens, width = x.shape
        y = functional.linear(functional.layer_norm(x, (width,), *of("norm1"), EPS), *of("attn.qkv"))
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in y.split(width, dim=2))
        attention = (q @ k.transpose(2, 3) / (width // heads) ** 0.5).softmax(dim=-1) @ v
        x = x + functional.linear(attention.transpose(1, 2).reshape(n, tokens, width), *of("attn.proj"))
        y = functional.linear(functional.layer_norm(x, (width,), *of("norm2"), EPS), *of("mlp.fc1"))
        x = x + functional.linear(functional.gelu(y), *of("mlp.fc2"))
    return x


def encoded(weights: dict[str, torch.Tensor], images: torch.Tensor, heads: int) -> torch.Tensor:
    """What the encoder's blocks make of normalised images, before any norm: [n, 1 + L, width]."""
    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    patches = functional.conv2d(images, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    cls = weights["cls_token"].expand(len(images), -1, -1)
    return run_blocks(weights, "blocks", torch.cat([cls, patches], dim=1) + weights["pos_embed"], heads)


def normed(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)


def decoded(weights: dict[str, torch.Tensor], latent: torch.Tensor, heads: int) -> torch.Tensor:
    """What the decoder predicts of tokens of all patches, none masked: [n, L, p · p · 3]."""
    x = functional.linear(latent, weights["decoder_embed.weight"], weights["decoder_embed.bias"])
    x = run_blocks(weights, "decoder_blocks", x + weights["decoder_pos_embed"], heads)
    x = functional.linear(
        normed(weights, "decoder_norm", x), weights["decoder_pred.weight"], weights["decoder_pred.bias"]
    )
    return x[:, 1:]


def small(kind: str = "visualize", image: int = 32, patch: int = 8) -> dict[str, torch.Tensor]:
    return random_weights(shapes(kind, 24, 2, patch, image, d=16, d_depth=1))


HINTS = {"heads": 3, "decoder_heads": 2}  # for weights of `small`
