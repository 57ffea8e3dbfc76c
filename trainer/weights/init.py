"""Initialise a model from other weights: of a run, of a model folder, or of a file. Freeze blocks for partial fine-tuning."""

import json
from typing import TypeVar, cast

import torch
from torch import nn

from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from trainer.config.model_schema import EncoderConfig, ModelConfig
from trainer.config.schema import InitConfig, RunConfig
from trainer.models.mae import MAE
from trainer.models.pixels import resolve_pixels
from trainer.models.vit import ViT, pixel_statistics
from trainer.run.checkpoint import find_checkpoint
from trainer.run.run import CONFIG
from trainer.weights.channels import (
    ADAPTABLE,
    FIRST_LAYER,
    LAST_LAYER,
    adapt_channels,
    describe_adaptation,
)
from trainer.weights.files import is_http
from trainer.weights.pretrained import PretrainedModel, model_exists, read_initial_model, read_pretrained
from trainer.weights.resize import interpolate_pos_embed
from trainer.weights.state_dicts import DECODER_HEADS, HEADS

ARCHITECTURE = ("image_size", "patch_size", "width", "depth", "heads", "channels")
ENCODER_PREFIXES = ("cls_token", "pos_embed", "patch_embed.", "blocks.")  # the last norm is not among them
MAX_LISTED = 3  # problems that an error message lists
ConfigT = TypeVar("ConfigT", bound=RunConfig)


def resolve_init(config: ConfigT) -> ConfigT:
    """Return the config with the full location and the step of its `init` filled in.

    Raises UserError if there is no model at that location.
    """
    init = getattr(config, "init", None)
    if not isinstance(init, InitConfig):
        return config
    store = open_store(init.run)
    if not is_http(init.run) and store.exists(CONFIG):
        resolved = InitConfig(run=store.url, step=find_checkpoint(store, init.step))
        return cast(ConfigT, config.model_copy(update={"init": resolved}))
    if init.step is not None:
        raise UserError(
            f"init: {init.run} is not a run (it has no {CONFIG}) and has no checkpoints: omit init.step"
        )
    if not model_exists(init.run):
        raise UserError(f"init: {init.run} is not a run, a model folder or a weight file")
    return config


def resolve_start(config: ConfigT, dataset: Dataset) -> ConfigT:
    """Return the config of a new run with everything filled in that depends on `init` and on the dataset's images.

    Raises UserError as `resolve_init` and `resolve_pixels`.
    """
    config = resolve_init(config)
    init = getattr(config, "init", None)
    initial = read_initial_model(init.run, init.step) if isinstance(init, InitConfig) else None
    return resolve_pixels(config, dataset, initial)


def init_encoder(init: InitConfig, model: ViT, norm: str | None) -> list[str]:
    """Copy a pre-trained encoder into `model`; position embeddings are interpolated if the patch grids differ, and the first
    layer is adapted if the numbers of channels do.

    Args:
        norm: name of the model's module that takes the encoder's last norm. None: the model keeps its own.

    Returns lines for the user, on what was adapted. Raises UserError if the encoder has another architecture.
    """
    pretrained = _read_init(init, model)
    weights = _with_prefix(pretrained.weights, ENCODER_PREFIXES)
    if norm:
        weights |= {
            f"{norm}.{key}": pretrained.weights[f"norm.{key}"]
            for key in ("weight", "bias")
            if f"norm.{key}" in pretrained.weights
        }
    prefixes = (*ENCODER_PREFIXES, *((f"{norm}.",) if norm else ()))
    return _load(weights, pretrained, init, model, prefixes)


def init_mae(init: InitConfig, model: MAE) -> list[str]:
    """Copy a pre-trained MAE into `model`, or an encoder alone; then the decoder keeps its weights. As `init_encoder`."""
    pretrained = _read_init(init, model)
    has_decoder = "decoder_pos_embed" in pretrained.weights
    prefixes = (*ENCODER_PREFIXES, "norm.", *(("mask_token", "decoder_") if has_decoder else ()))
    return _load(_with_prefix(pretrained.weights, prefixes), pretrained, init, model, prefixes)


def _with_prefix(weights: dict[str, torch.Tensor], prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefixes)}


def _read_init(init: InitConfig, model: ViT) -> PretrainedModel:
    """Read the pre-trained model. Heads that neither its files nor published models tell are taken from `model`."""
    hints = {} if model.cls_token.shape[-1] in HEADS else {"heads": model.heads}
    if not isinstance(model, MAE):
        hints["decoder_heads"] = 1  # the decoder is not used; 1 fits any width
    elif model.config.decoder_width not in DECODER_HEADS:
        hints["decoder_heads"] = model.config.decoder_heads
    return read_pretrained(init.run, init.step, hints, already_reached=True)


def _load(
    weights: dict[str, torch.Tensor],
    pretrained: PretrainedModel,
    init: InitConfig,
    model: ViT,
    prefixes: tuple[str, ...],
) -> list[str]:
    """Load `weights` into the parameters of `model` that have one of `prefixes`. Returns lines on what was adapted.

    Raises UserError if they do not match.
    """
    wanted = _with_prefix(model.state_dict(), prefixes)
    notes = _adapt_channels(weights, wanted, pretrained.model.channels, model.channels)
    notes += _other_normalisation(pretrained.model, model)
    for name in {"pos_embed", "decoder_pos_embed"} & weights.keys():
        weights[name] = interpolate_pos_embed(weights[name], pretrained.model.grid, model.grid)
    problems = _mismatches(pretrained, model)
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - weights.keys())]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & weights.keys())
        if weights[name].shape != wanted[name].shape
    ]
    if problems:
        more = f", and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        which = f"step {init.step} of {init.run}" if init.step else init.run
        raise UserError(
            f"init: {which} does not match this run's model: {'; '.join(problems[:MAX_LISTED])}{more}. "
            f"Set the keys of `model` to those of the pre-trained model: {_model_overrides(pretrained.model, model)}"
        )
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    return notes


def _other_normalisation(pretrained: EncoderConfig, model: ViT) -> list[str]:
    """Return a line if the pre-trained model normalises the same kind of pixels in another way than `model`."""
    if (pretrained.channels, pretrained.pixel_dtype) != (model.channels, model.pixel_dtype):
        return []
    mean, std = (torch.tensor(values).to(model.pixel_mean) for values in pixel_statistics(pretrained))
    if torch.equal(mean, model.pixel_mean.flatten()) and torch.equal(std, model.pixel_std.flatten()):
        return []
    values = ", ".join(
        f"{name}: {json.dumps(list(values))}"
        for name, values in zip(("mean", "std"), pixel_statistics(pretrained), strict=True)
    )
    return [
        f"init: the weights were trained with another normalisation of pixels; data.normalise={{{values}}} would use theirs"
    ]


def _adapt_channels(
    weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], before: int, after: int
) -> list[str]:
    """Adapt the first layer in `weights` to another number of channels, and leave the prediction layer of an MAE as the model
    has it: it is removed from both. Returns lines on that; nothing is changed if the first layer cannot be adapted."""
    adapted = None if before == after else adapt_channels(weights[FIRST_LAYER], after)
    if adapted is None:
        return []
    weights[FIRST_LAYER] = adapted
    notes = [describe_adaptation(before, after)]
    if any(name in weights for name in LAST_LAYER):
        notes.append(
            f"init: the decoder's prediction layer starts from random weights, because it has {after} channels instead of {before}"
        )
    for name in LAST_LAYER:
        weights.pop(name, None)
        wanted.pop(name, None)
    return notes


def _model_overrides(pretrained: EncoderConfig, model: ViT) -> str:
    """Return the pre-trained model's architecture as overrides, for example "model.width=192 model.depth=6"."""
    keys = [key for key in ARCHITECTURE if key != "channels" or pretrained.channels != model.channels]
    if isinstance(model, MAE) and isinstance(pretrained, ModelConfig):
        keys += ["decoder_width", "decoder_depth", "decoder_heads"]
    values = pretrained.model_dump(mode="json", include=set(keys))
    return " ".join(f"model.{key}={json.dumps(values[key], separators=(',', ':'))}" for key in keys)


def _mismatches(pretrained: PretrainedModel, model: ViT) -> list[str]:
    """List differences between two architectures that shapes do not show, or show less clearly."""
    old, problems = pretrained.model, []
    if old.patch_size != model.patch_size:
        problems.append(
            f"its patch size is {old.patch_size}, not {model.patch_size} (position embeddings can be interpolated, patch "
            "embeddings cannot)"
        )
    if old.channels != model.channels and old.channels not in ADAPTABLE and model.channels != 1:
        problems.append(
            f"it has {old.channels} channels, not {model.channels} (only a first layer of 1 or 3 channels can be adapted)"
        )
    if old.heads != model.heads:
        problems.append(f"it has {old.heads} heads, not {model.heads}")
    if (
        isinstance(model, MAE)
        and isinstance(old, ModelConfig)
        and old.decoder_heads != model.config.decoder_heads
    ):
        problems.append(f"its decoder has {old.decoder_heads} heads, not {model.config.decoder_heads}")
    return problems


def freeze(model: nn.Module, depth: int, blocks: float) -> None:
    """Freeze everything before the last `blocks` of `depth` blocks; 0.5 trains only the MLP of the last block.

    Source: paper, section 4.3, "Partial Fine-tuning".
    """
    for name, parameter in model.named_parameters():
        if name.startswith(("patch_embed", "cls_token", "pos_embed")):
            parameter.requires_grad_(False)
        elif name.startswith("blocks."):
            from_end = depth - int(name.split(".")[1])  # 1: the last block
            half = blocks == 0.5 and from_end == 1 and ".mlp." in name
            parameter.requires_grad_(from_end <= blocks or half)
