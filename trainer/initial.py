"""What a run begins with that goes on from another: the encoder of a commit."""

from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.errors import UserError
from pipeline.storage import open_store
from trainer.checkpoint import chosen_step, read_weights
from trainer.config import InitConfig, LabelledRunConfig, RunConfig
from trainer.run import read_config
from trainer.vit import ViT

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.")
C = TypeVar("C", bound=RunConfig)


def fix_init(config: C) -> C:
    """The config with folder and step of its `init` filled in. UserError where there is no such commit."""
    if not isinstance(config, LabelledRunConfig) or not isinstance(config.init, InitConfig):
        return config
    store = open_store(config.init.run)
    read_config(store)  # it is a run
    step = chosen_step(store, config.init.step)
    return cast(C, config.model_copy(update={"init": InitConfig(run=store.url, step=step)}))


def load_encoder(init: InitConfig, model: ViT, norm: str | None) -> None:
    """Put the encoder of a commit into `model`. Positions are interpolated where its grid is another.

    Args:
        norm: the name of the model's parameter group that takes the encoder's last norm; None: it keeps its own.

    UserError where it has another shape.
    """
    assert init.step is not None
    weights = read_weights(open_store(init.run), init.step)
    weights = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}  # of a linear probe
    found = {name: tensor for name, tensor in weights.items() if name.startswith(ENCODER)}
    if norm:
        found |= {
            f"{norm}.{key}": weights[f"norm.{key}"] for key in ("weight", "bias") if f"norm.{key}" in weights
        }
    wanted = model.state_dict()
    if "pos_embed" in found and found["pos_embed"].shape[-1] == wanted["pos_embed"].shape[-1]:
        found["pos_embed"] = interpolated(found["pos_embed"], _grid_of(init), model.grid)
    needed = {name for name in wanted if name.startswith((*ENCODER, *((f"{norm}.",) if norm else ())))}
    missing = sorted(needed - found.keys())
    odd = [f"{n} is {list(found[n].shape)}, not {list(wanted[n].shape)}" for n in sorted(needed & found.keys())
           if found[n].shape != wanted[n].shape]  # fmt: skip
    if problems := [*(f"{name} is missing" for name in missing), *odd]:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"init: step {init.step} of {init.run} is not an encoder of this shape: {'; '.join(problems[:3])}{more}. "
            "Give the model of the run that it comes from"
        )
    model.load_state_dict({name: found[name] for name in needed}, strict=False)


def _grid_of(init: InitConfig) -> tuple[int, int]:
    """Rows and columns of patches of the run."""
    return read_config(open_store(init.run)).model.grid


def interpolated(positions: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Positions float[1, 1 + L, width] of one grid of patches (rows, columns) for another, by bicubic interpolation; the
    class token's stays (the authors' util/pos_embed.py)."""
    if old == new:
        return positions
    cls, patches = positions[:, :1], positions[:, 1:]
    image = patches.unflatten(1, old).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls, image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def freeze(model: nn.Module, depth: int, blocks: float) -> None:
    """Train only the last `blocks` blocks, and what comes after them; of half a block its MLP (paper, section 4.3, "Partial
    Fine-tuning")."""
    for name, parameter in model.named_parameters():
        if name.startswith(("patch_embed", "cls_token", "pos_embed")):
            parameter.requires_grad_(False)
        elif name.startswith("blocks."):
            nth = depth - int(name.split(".")[1])  # 1 for the last
            half = blocks == 0.5 and nth == 1 and ".mlp." in name
            parameter.requires_grad_(nth <= blocks or half)
