"""Adapt a model to another image size by interpolating its position embeddings."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import ValidationError

from pipeline.errors import UserError
from trainer.config.model_schema import EncoderConfig
from trainer.weights.pretrained import PretrainedModel


def resize_config(model: EncoderConfig, size: tuple[int, int], option: str) -> EncoderConfig:
    """Return the config for another image size (height, width in pixels).

    Raises UserError, prefixed with the name of the `option`, if the patch size does not divide it.
    """
    try:
        return type(model).model_validate({**model.model_dump(), "image_size": size})
    except ValidationError as error:
        reasons = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise UserError(f"{option}: {reasons}") from None


def resize_model(
    pretrained: PretrainedModel, size: tuple[int, int], option: str = "--image-size"
) -> PretrainedModel:
    """Adapt a model to another image size (height, width in pixels): position embeddings are interpolated, the patch size
    stays. Raises as `resize_config`."""
    model = resize_config(pretrained.model, size, option)
    weights = dict(pretrained.weights)
    for name in {"pos_embed", "decoder_pos_embed"} & weights.keys():
        weights[name] = interpolate_pos_embed(weights[name], pretrained.model.grid, model.grid)
    return PretrainedModel(replace(pretrained.info, model=model), weights)


def interpolate_pos_embed(
    pos_embed: torch.Tensor, old: tuple[int, int], new: tuple[int, int]
) -> torch.Tensor:
    """Interpolate a position embedding for another patch grid, bicubic (the authors' util/pos_embed.py).

    Args:
        pos_embed: float[1, 1 + L, width]; the first position, the class token's, stays as it is.
        old: rows and columns of the present grid; L is their product.
        new: rows and columns of the new grid.

    Returns float[1, 1 + new L, width].
    """
    if old == new:
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    image = patches.unflatten(1, old).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls, image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
