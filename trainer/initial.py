"""What a run begins with that goes on from other weights: of a run, or of others' files."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.storage import open_store
from trainer.checkpoint import chosen_step
from trainer.config import InitConfig, ModelConfig, RunConfig
from trainer.layouts import DECODER_HEADS, HEADS
from trainer.mae import MAE
from trainer.pretrained import Pretrained, interpolated, is_model, read_pretrained
from trainer.run import CONFIG
from trainer.vit import ViT
from trainer.weight_files import is_http

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.")
C = TypeVar("C", bound=RunConfig)


def fix_init(config: C) -> C:
    """The config with folder and step of its `init` filled in. UserError where there is nothing of the kind."""
    init = getattr(config, "init", None)
    if not isinstance(init, InitConfig):
        return config
    store = open_store(init.run)
    if not is_http(init.run) and store.exists(CONFIG):
        return cast(
            C,
            config.model_copy(update={"init": InitConfig(run=store.url, step=chosen_step(store, init.step))}),
        )
    if init.step is not None:
        raise UserError(f"init: {init.run} is not a run: it has no {CONFIG}, and no steps to choose from")
    if not is_model(init.run):
        raise UserError(f"init: {init.run} is not a run, not a folder of a model and not a file of weights")
    return config


def load_encoder(init: InitConfig, model: ViT, norm: str | None) -> None:
    """Put the encoder of a run, or of others' file, into `model`. Positions are interpolated where its grid is another.

    Args:
        norm: the name of the model's parameter group that takes the encoder's last norm; None: it keeps its own.

    UserError where it has another shape.
    """
    found = _read(init, model)
    weights = {name: tensor for name, tensor in found.weights.items() if name.startswith(ENCODER)}
    if norm:
        weights |= {
            f"{norm}.{key}": found.weights[f"norm.{key}"]
            for key in ("weight", "bias")
            if f"norm.{key}" in found.weights
        }
    groups = (*ENCODER, *((f"{norm}.",) if norm else ()))
    _load(weights, found, init, model, lambda name: name.startswith(groups))


def load_mae(init: InitConfig, model: MAE) -> None:
    """Put an MAE into `model`, or an encoder, if there is no more: then the decoder keeps what it has. As `load_encoder`."""
    found = _read(init, model)
    whole = "decoder_pos_embed" in found.weights
    wanted = (*ENCODER, "norm.", *(("mask_token", "decoder_") if whole else ()))
    weights = {name: tensor for name, tensor in found.weights.items() if name.startswith(wanted)}
    _load(weights, found, init, model, lambda name: name.startswith(wanted))


def _read(init: InitConfig, model: ViT) -> Pretrained:
    """What is begun with. Heads that neither file nor published models tell are the model's."""
    told = {} if model.cls_token.shape[-1] in HEADS else {"heads": model.heads}
    if not isinstance(model, MAE):
        told["decoder_heads"] = 1  # of no interest, and any width has them
    elif model.config.decoder_width not in DECODER_HEADS:
        told["decoder_heads"] = model.config.decoder_heads
    return read_pretrained(init.run, init.step, told, known=True)


def _load(
    weights: dict[str, torch.Tensor],
    found: Pretrained,
    init: InitConfig,
    model: ViT,
    needs: Callable[[str], bool],
) -> None:
    wanted = {name: tensor for name, tensor in model.state_dict().items() if needs(name)}
    for name in {"pos_embed", "decoder_pos_embed"} & weights.keys():
        weights[name] = interpolated(weights[name], found.model.grid, model.grid)
    problems = []
    if found.model.patch_size != model.patch_size:
        problems.append(
            f"its patches are {found.model.patch_size} pixels wide, not {model.patch_size}: positions can be interpolated, "
            "what was learnt of patches cannot"
        )
    if found.model.heads != model.heads:
        problems.append(f"it has {found.model.heads} heads, not {model.heads}")
    if isinstance(model, MAE) and isinstance(found.model, ModelConfig):
        old, new = found.model.decoder_heads, model.config.decoder_heads
        problems += [f"its decoder has {old} heads, not {new}"] if old != new else []
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - weights.keys())]
    problems += [
        f"{name} is {list(weights[name].shape)}, not {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & weights.keys())
        if weights[name].shape != wanted[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        which = f"step {init.step} of {init.run}" if init.step else init.run
        raise UserError(
            f"init: {which} is not an encoder of this shape: {'; '.join(problems[:3])}{more}. "
            "Give the model of the run that it comes from"
        )
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)


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
