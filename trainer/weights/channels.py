"""Channels and normalisation of weights: adapt the first layer to another number of channels, and translate the normalisation
of a model to and from the config files of timm and transformers.

maestream's own keys `pixel_dtype` and `pixel_bits` are in these files, too: neither project records the type of the pixels.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from trainer.config.model_schema import EncoderConfig
from trainer.models.vit import MEAN, PIXEL_SCALES, STD, pixel_statistics

FIRST_LAYER = "patch_embed.proj.weight"
LAST_LAYER = ("decoder_pred.weight", "decoder_pred.bias")  # of an MAE: it predicts all channels of a pixel
ADAPTABLE = (1, 3)  # numbers of channels whose weights can be repeated


def adapt_channels(weight: torch.Tensor, channels: int) -> torch.Tensor | None:
    """Adapt the weight of a first layer to another number of channels, as timm does (`adapt_input_conv` in its
    timm/models/_manipulate.py).

    For one channel, the weights of all channels are added. For more, those of RGB (or of grey) are repeated, and scaled by the old
    over the new number of channels, so that the layer's outputs keep their size.

    Args:
        weight: float[width, c, p, p].

    Returns float[width, channels, p, p], or None if weights of so many channels cannot be adapted.
    """
    before = weight.shape[1]
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    if before not in ADAPTABLE:
        return None
    repeated = weight.float().repeat(1, math.ceil(channels / before), 1, 1)[:, :channels]
    return (repeated * (before / channels)).to(weight.dtype)


def describe_adaptation(before: int, after: int) -> str:
    """Return one line on what `adapt_channels` did."""
    how = (
        "the weights of its channels are added"
        if after == 1
        else f"its weights are repeated and scaled by {before}/{after}"
    )
    return f"init: the first layer is adapted from {before} to {after} channels: {how} (timm's rule)"


def preprocessor_config(model: EncoderConfig) -> dict[str, Any]:
    """Return the preprocessor_config.json of transformers' ViTImageProcessor."""
    height, width = model.size
    mean, std = pixel_statistics(model)
    is_scaled = model.pixel_dtype != "float32"
    scale = PIXEL_SCALES[getattr(torch, model.pixel_dtype)] if is_scaled else 1
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": is_scaled,
        "rescale_factor": 1 / scale,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def pixel_hints(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hints for `trainer.weights.state_dicts.infer_config` on pixels that files of timm or transformers have.

    Args:
        config: the content of config.json.
        preprocessor: that of transformers' preprocessor_config.json; empty if there is none.
    """
    settings = config.get("pretrained_cfg")
    if isinstance(settings, dict):
        mean, std = settings.get("mean"), settings.get("std")
    else:
        mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    hints: dict[str, Any] = {}
    if isinstance(mean, list) and isinstance(std, list) and [mean, std] != [list(MEAN), list(STD)]:
        hints |= {"pixel_mean": mean, "pixel_std": std}
    return hints | {key: config[key] for key in ("pixel_dtype", "pixel_bits") if key in config}
