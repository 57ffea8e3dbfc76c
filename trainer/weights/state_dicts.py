"""State dicts: convert parameter names between projects, and infer the architecture from shapes.

maestream has the parameter names of the MAE authors' code, which are also timm's. transformers has other names, and separate
tensors for query, key and value. Files on its hub have the names of version 4,
`vit.encoder.layer.0.attention.attention.query`; version 5 converts them to `vit.layers.0.attention.q_proj` when it loads
them. We write the names of version 4 and read both.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import ValidationError

from pipeline.errors import UserError
from trainer.config.model_schema import ClassifierConfig, EncoderConfig, ModelConfig
from trainer.models.classifier import Classifier, Encoder
from trainer.models.mae import MAE
from trainer.models.vit import LAYER_NORM_EPS, ViT, pixel_statistics

Weights = dict[str, torch.Tensor]
MAX_LISTED = 8  # problems that an error message lists
# Attention heads by width. Encoder: ViT-Ti and S (Touvron et al. 2020, arXiv 2012.12877, Table 1), ViT-B, L and H
# (Dosovitskiy et al. 2020, Table 1). Decoder: the authors' models_mae.py.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}
PIXEL_KEYS = ("pixel_dtype", "pixel_bits", "pixel_mean", "pixel_std")
TIMM_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}

TRANSFORMERS_CLASSES = {
    "mae": "ViTMAEForPreTraining",
    "classifier": "ViTForImageClassification",
    "encoder": "ViTModel",
}

# Our names → those of transformers, version 4; below the prefix "vit.".
NON_BLOCK_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
BLOCK_NAMES_V5 = {  # names of version 5 → version 4
    "attention.q_proj": QKV[0],
    "attention.k_proj": QKV[1],
    "attention.v_proj": QKV[2],
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# Version 5 writes decoder_encoder.layer, all other versions decoder_layers.
BLOCK_PATTERN = re.compile(
    r"(?:(?:vit\.)?(?:encoder\.layer|layers)|(decoder)\.(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.+)\.(weight|bias)"
)


def model_kind(model: EncoderConfig) -> Literal["mae", "classifier", "encoder"]:
    """Return the kind of model that a config describes."""
    if isinstance(model, ModelConfig):
        return "mae"
    return "classifier" if isinstance(model, ClassifierConfig) else "encoder"


def build_model(model: EncoderConfig, classes: int = 1) -> ViT:
    """Build a model with random weights. `classes` is the size of a classifier's head."""
    if isinstance(model, ModelConfig):
        return MAE(model)
    return Classifier(model, classes) if isinstance(model, ClassifierConfig) else Encoder(model)


def to_transformers(weights: Mapping[str, torch.Tensor], model: EncoderConfig) -> Weights:
    """Rename our weights for the model's class in TRANSFORMERS_CLASSES.

    Query, key and value are split into three tensors.
    """
    vit = "" if model_kind(model) == "encoder" else "vit."
    theirs: Weights = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            decoder, nth, layer, kind = match.groups()
            stem = f"decoder.decoder_layers.{nth}." if decoder else f"{vit}encoder.layer.{nth}."
            if layer == "attn.qkv":
                theirs |= {f"{stem}{q}.{kind}": part for q, part in zip(QKV, tensor.chunk(3), strict=True)}
            else:
                theirs[f"{stem}{BLOCK_NAMES[layer]}.{kind}"] = tensor
        elif name in NON_BLOCK_NAMES:
            theirs[vit + NON_BLOCK_NAMES[name]] = tensor
        elif name.startswith("head."):
            theirs[name.replace("head.", "classifier.")] = tensor
        else:  # mask_token, decoder_embed, …
            theirs[f"decoder.{name}"] = tensor
    return theirs


def is_transformers_layout(names: Mapping[str, Any]) -> bool:
    """Return whether parameter names are those of transformers."""
    return any("embeddings.patch_embeddings." in name for name in names)


def to_native(theirs: Mapping[str, torch.Tensor], where: str) -> Weights:
    """Rename weights of any layout to our names; unknown names stay as they are.

    Raises UserError if query, key and value do not fit together. `where` names the file in messages.
    """
    if not is_transformers_layout(theirs):
        return dict(theirs)
    non_block, block = ({new: old for old, new in table.items()} for table in (NON_BLOCK_NAMES, BLOCK_NAMES))
    ours: Weights = {}
    qkv_parts: dict[str, Weights] = {}
    for name, tensor in theirs.items():
        plain = name.removeprefix("vit.")
        if match := BLOCK_PATTERN.fullmatch(name):
            decoder, nth, layer, kind = match.groups()
            layer = BLOCK_NAMES_V5.get(layer, layer)
            stem = f"{'decoder_' if decoder else ''}blocks.{nth}."
            if layer in QKV:
                qkv_parts.setdefault(f"{stem}attn.qkv.{kind}", {})[layer] = tensor
            else:
                ours[f"{stem}{block.get(layer, layer)}.{kind}"] = tensor
        elif plain in non_block:
            ours[non_block[plain]] = tensor
        elif not plain.startswith("pooler."):  # the pooler is not part of the encoder
            ours[name.removeprefix("decoder.").replace("classifier.", "head.")] = tensor
    for name, parts in qkv_parts.items():
        if missing := [part for part in QKV if part not in parts]:
            raise UserError(f"{where}: {name} lacks {', '.join(part.rpartition('.')[2] for part in missing)}")
        try:
            ours[name] = torch.cat([parts[part] for part in QKV])
        except RuntimeError:
            shapes = ", ".join(str(list(parts[part].shape)) for part in QKV)
            raise UserError(
                f"{where}: query, key and value of {name} have shapes that do not fit together: {shapes}"
            ) from None
    return ours


def infer_config(weights: Mapping[str, torch.Tensor], where: str, hints: Mapping[str, Any]) -> EncoderConfig:
    """Infer the architecture from weights with our names: an MAE, a classifier, or an encoder alone.

    Args:
        where: the file, for messages.
        hints: config values that shapes do not determine, as far as they are known: heads, decoder_heads, norm_pix,
            mask_ratio, sampling, masked, pool, PIXEL_KEYS, and image_size of images that are not
            square. Without hints, heads are those of the published model of the same width.

    Raises UserError if a parameter is missing or has the wrong number of dimensions, or if the heads are unknown.
    """
    has_decoder, has_head = any(n.startswith("decoder_") for n in weights), "head.weight" in weights
    width, channels, patch, _ = _shape(weights, "patch_embed.proj.weight", 4, where)
    positions = _shape(weights, "pos_embed", 3, where)[1]
    config: dict[str, Any] = {"width": width, "patch_size": patch, "depth": _depth(weights, "blocks")}
    config |= {key: hints[key] for key in PIXEL_KEYS if key in hints}
    config["channels"] = channels
    config["heads"] = hints.get("heads") or _heads(width, HEADS, "--heads", where)
    if "image_size" in hints:
        config["image_size"] = hints["image_size"]
    else:
        side = math.isqrt(max(positions - 1, 0))
        if side * side != positions - 1 or not side:
            raise UserError(
                f"{where}: pos_embed has {positions} positions, which is not a class token and a square grid of patches"
            )
        config["image_size"] = side * patch
    kind: type[EncoderConfig] = EncoderConfig
    if has_decoder:
        kind = ModelConfig
        decoder_width = _shape(weights, "decoder_embed.weight", 2, where)[0]
        config |= {"decoder_width": decoder_width, "decoder_depth": _depth(weights, "decoder_blocks")}
        config["decoder_heads"] = hints.get("decoder_heads") or _heads(
            decoder_width, DECODER_HEADS, "--decoder-heads", where
        )
        config |= {
            key: hints[key] for key in ("norm_pix", "mask_ratio", "sampling", "masked") if key in hints
        }
    elif has_head:
        kind = ClassifierConfig
        _shape(weights, "head.weight", 2, where)
        config["pool"] = hints.get("pool") or ("mean" if "fc_norm.weight" in weights else "class")
    try:
        return kind(**config)
    except ValidationError as error:
        reasons = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise UserError(f"{where} is not a supported model: {reasons}") from None


def _depth(weights: Mapping[str, torch.Tensor], stack: str) -> int:
    """Return the number of blocks of a stack, `blocks` or `decoder_blocks`."""
    numbers = (int(m[1]) for name in weights if (m := re.match(stack + r"\.(\d{1,4})\.", name)))
    return 1 + max(numbers, default=0)


def _shape(weights: Mapping[str, torch.Tensor], name: str, dimensions: int, where: str) -> tuple[int, ...]:
    if name not in weights:
        keys = ", ".join(list(weights)[:3])
        raise UserError(f"{where} is not a supported ViT: it has no parameter {name} (it has {keys}, …)")
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise UserError(
            f"{where}: {name} has shape {list(shape)}, expected {dimensions} dimensions, none of them empty"
        )
    return shape


def _heads(width: int, table: dict[int, int], option: str, where: str) -> int:
    if width not in table:
        raise UserError(
            f"{where}: the number of attention heads is unknown, because no published model has width {width}: "
            f"import it with `maestream import … {option} N`"
        )
    return table[width]


def check_shapes(weights: Mapping[str, torch.Tensor], model: EncoderConfig, where: str) -> None:
    """Raise UserError that lists missing, unknown and wrongly shaped parameters of weights with our names."""
    _check_size(weights, model, where)
    classes = next(iter(weights["head.weight"].shape), 1) if "head.weight" in weights else 1
    with torch.device("meta"):
        wanted = build_model(model, classes).state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems += [f"{name} is unknown" for name in weights if name not in wanted]
    if problems:
        more = f", and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise UserError(f"{_not_valid(where, model)}: {'; '.join(problems[:MAX_LISTED])}{more}")


def _not_valid(where: str, model: EncoderConfig) -> str:
    kind = model_kind(model)
    return f"{where} is not a valid {'MAE' if kind == 'mae' else kind} checkpoint"


def _check_size(weights: Mapping[str, torch.Tensor], model: EncoderConfig, where: str) -> None:
    """Raise UserError if the config's size does not match the weights.

    This runs before the model is built: building one of a wrong size could take any amount of time and memory.
    """
    blocks, positions = model.depth, {"pos_embed": model.width}
    if isinstance(model, ModelConfig):
        blocks += model.decoder_depth
        positions["decoder_pos_embed"] = model.decoder_width
    for name, width in positions.items():
        shape, wanted = (
            list(weights[name].shape) if name in weights else [],
            [1, 1 + model.num_patches, width],
        )
        if shape != wanted:
            has = f"has shape {shape}" if shape else "is missing"
            raise UserError(f"{_not_valid(where, model)}: {name} {has}, expected {wanted}")
    if len(weights) < 12 * blocks:  # a block has 12 parameters
        raise UserError(
            f"{_not_valid(where, model)}: it has {len(weights)} parameters, too few for {blocks} blocks"
        )


def transformers_config(model: EncoderConfig) -> dict[str, Any]:
    """Return the config.json of transformers' ViTMAEConfig or ViTConfig, without architecture and dtype."""
    height, width = model.size
    config: dict[str, Any] = {
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": 4 * model.width,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        **_pixel_type(model),
    }
    if isinstance(model, ModelConfig):
        config |= {
            "decoder_hidden_size": model.decoder_width,
            "decoder_num_hidden_layers": model.decoder_depth,
            "decoder_num_attention_heads": model.decoder_heads,
            "decoder_intermediate_size": 4 * model.decoder_width,
            "mask_ratio": model.mask_ratio,
            "norm_pix_loss": model.norm_pix,
        }
    return config


def hints_from_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hints for `infer_config` that a config.json of transformers has."""
    names = {
        "image_size": "image_size",
        "num_attention_heads": "heads",
        "decoder_num_attention_heads": "decoder_heads",
        "mask_ratio": "mask_ratio",
        "norm_pix_loss": "norm_pix",
    }
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _pixel_type(model: EncoderConfig) -> dict[str, Any]:
    """Return maestream's keys for the type of the pixels, unless it is the one that everyone assumes."""
    if model.pixel_dtype == "uint8":
        return {}
    return {"pixel_dtype": model.pixel_dtype, "pixel_bits": model.pixel_bits}


def timm_config(model: EncoderConfig, classes: int) -> dict[str, Any]:
    """Return the config.json of a timm ViT, for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    size = TIMM_SIZES.get(model.width, "base")
    patch = {"huge": 14}.get(size, 16)
    pool = "avg" if isinstance(model, ClassifierConfig) and model.pool == "mean" else "token"
    mean, std = pixel_statistics(model)
    return {
        "architecture": f"vit_{size}_patch{patch}_224",
        "num_classes": classes,
        "num_features": model.width,
        "global_pool": pool,
        **_pixel_type(model),
        "model_args": {
            **({} if model.channels == 3 else {"in_chans": model.channels}),
            "img_size": list(model.size),
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "global_pool": pool,
            "fc_norm": pool == "avg",
        },
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [model.channels, *model.size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "mean": list(mean),
            "std": list(std),
            # timm 1.0 adapts the layer that is named here as if it had 3 channels.
            "first_conv": "patch_embed.proj" if model.channels == 3 else None,
            "classifier": "head",
        },
    }


def hints_from_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hints for `infer_config` that a config.json of timm has."""
    args = config.get("model_args")
    args = args if isinstance(args, dict) else {}
    names = {"img_size": "image_size", "num_heads": "heads"}
    hints = {ours: args[theirs] for theirs, ours in names.items() if theirs in args}
    if isinstance(size := hints.get("image_size"), list) and size and size.count(size[0]) == len(size):
        hints["image_size"] = size[0]
    # Input of the head. With "avg" and no fc_norm, timm normalises before the mean, which no maestream model does:
    # `check_shapes` then refuses the weights, because fc_norm is missing.
    if pool := args.get("global_pool", config.get("global_pool")):
        hints["pool"] = {"avg": "mean", "token": "class"}.get(str(pool), pool)
    return hints
