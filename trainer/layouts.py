"""How others call our weights, and what shape of model weights are of.

Our names are the authors', and timm's: theirs came from timm. `transformers` has names of its own, and query, key and value
apart. Its hub has the names of its fourth version, `vit.encoder.layer.0.attention.attention.query`, which the fifth reads
too and changes into its own, `vit.layers.0.attention.q_proj`. We write the former and read both.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import ValidationError

from pipeline.errors import UserError
from trainer.classifier import Classifier, Encoder
from trainer.config import ClassifierConfig, EncoderConfig, ModelConfig
from trainer.mae import MAE
from trainer.vit import LAYER_NORM_EPS, MEAN, STD, ViT

Weights = dict[str, torch.Tensor]
NAMED = 8  # keys that a message lists
# Attention heads by width: ViT-Ti, S (Touvron et al. 2020, arXiv 2012.12877, Table 1), B, L, H (Dosovitskiy et al. 2020,
# Table 1); of the decoder: the authors' models_mae.py.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}
TIMM = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}

OUTSIDE = {  # of blocks: ours → transformers', below "vit."
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
BLOCK_OF_5 = {  # as the fifth version calls what it has changed
    "attention.q_proj": QKV[0],
    "attention.k_proj": QKV[1],
    "attention.v_proj": QKV[2],
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# The fifth version writes decoder_encoder.layer where all others have decoder_layers.
IN_BLOCK = re.compile(
    r"(?:(?:vit\.)?(?:encoder\.layer|layers)|(decoder)\.(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.+)\.(weight|bias)"
)


def kind_of(model: EncoderConfig) -> Literal["mae", "classifier", "encoder"]:
    if isinstance(model, ModelConfig):
        return "mae"
    return "classifier" if isinstance(model, ClassifierConfig) else "encoder"


def network(model: EncoderConfig, classes: int = 1) -> ViT:
    """A network of this shape, with random weights."""
    if isinstance(model, ModelConfig):
        return MAE(model)
    return Classifier(model, classes) if isinstance(model, ClassifierConfig) else Encoder(model)


def to_transformers(weights: Mapping[str, torch.Tensor], model: EncoderConfig) -> Weights:
    """Our weights by the names of ViTMAEForPreTraining, ViTForImageClassification or, of an encoder alone, ViTModel."""
    vit = "" if kind_of(model) == "encoder" else "vit."
    theirs: Weights = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            decoder, nth, layer, kind = match.groups()
            stem = f"decoder.decoder_layers.{nth}." if decoder else f"{vit}encoder.layer.{nth}."
            if layer == "attn.qkv":
                theirs |= {f"{stem}{q}.{kind}": part for q, part in zip(QKV, tensor.chunk(3), strict=True)}
            else:
                theirs[f"{stem}{BLOCK[layer]}.{kind}"] = tensor
        elif name in OUTSIDE:
            theirs[vit + OUTSIDE[name]] = tensor
        elif name.startswith("head."):
            theirs[name.replace("head.", "classifier.")] = tensor
        else:  # mask_token, decoder_embed, …
            theirs[f"decoder.{name}"] = tensor
    return theirs


def is_transformers(names: Mapping[str, Any]) -> bool:
    return any("embeddings.patch_embeddings." in name for name in names)


def to_ours(theirs: Mapping[str, torch.Tensor], where: str) -> Weights:
    """Weights of any layout by our names. Names that nobody knows stay as they are. UserError where query, key and value
    do not fit together."""
    if not is_transformers(theirs):
        return dict(theirs)
    outside, block = ({new: old for old, new in table.items()} for table in (OUTSIDE, BLOCK))
    ours: Weights = {}
    apart: dict[str, Weights] = {}
    for name, tensor in theirs.items():
        plain = name.removeprefix("vit.")
        if match := IN_BLOCK.fullmatch(name):
            decoder, nth, layer, kind = match.groups()
            layer = BLOCK_OF_5.get(layer, layer)
            stem = f"{'decoder_' if decoder else ''}blocks.{nth}."
            if layer in QKV:
                apart.setdefault(f"{stem}attn.qkv.{kind}", {})[layer] = tensor
            else:
                ours[f"{stem}{block.get(layer, layer)}.{kind}"] = tensor
        elif plain in outside:
            ours[outside[plain]] = tensor
        elif not plain.startswith("pooler."):  # trained on another task, if at all; no part of the encoder
            ours[name.removeprefix("decoder.").replace("classifier.", "head.")] = tensor
    for name, parts in apart.items():
        if missing := [part for part in QKV if part not in parts]:
            raise UserError(f"{where}: {name} lacks {', '.join(part.rpartition('.')[2] for part in missing)}")
        try:
            ours[name] = torch.cat([parts[part] for part in QKV])
        except RuntimeError:
            shapes = ", ".join(str(list(parts[part].shape)) for part in QKV)
            raise UserError(f"{where}: query, key and value of {name} have odd shapes: {shapes}") from None
    return ours


def shape_of(weights: Mapping[str, torch.Tensor], where: str, told: Mapping[str, Any]) -> EncoderConfig:
    """What weights by our names are of: an MAE, a classifier, or an encoder alone.

    Args:
        told: keys of the config that weights do not tell (heads, image_size where it is no square, norm_pix, …), as far
            as they are known. Heads that are not are those of the published models of that width.

    UserError where keys that tell it are missing or odd, or nothing tells the heads.
    """
    decoder, head = any(n.startswith("decoder_") for n in weights), "head.weight" in weights
    width, _, patch, _ = _shape(weights, "patch_embed.proj.weight", 4, where)
    tokens = _shape(weights, "pos_embed", 3, where)[1]
    depths = {
        stack: 1
        + max((int(m[1]) for n in weights if (m := re.match(stack + r"\.(\d{1,4})\.", n))), default=0)
        for stack in ("blocks", "decoder_blocks")
    }
    found: dict[str, Any] = {"width": width, "patch_size": patch, "depth": depths["blocks"]}
    found["heads"] = told.get("heads") or _heads(width, HEADS, "--heads", where)
    if "image_size" in told:
        found["image_size"] = told["image_size"]
    else:
        side = math.isqrt(max(tokens - 1, 0))
        if side * side != tokens - 1 or not side:
            raise UserError(
                f"{where}: pos_embed has {tokens} places, which is no square of patches and a class token"
            )
        found["image_size"] = side * patch
    if decoder:
        decoder_width = _shape(weights, "decoder_embed.weight", 2, where)[0]
        found |= {"decoder_width": decoder_width, "decoder_depth": depths["decoder_blocks"]}
        found["decoder_heads"] = told.get("decoder_heads") or _heads(
            decoder_width, DECODER_HEADS, "--decoder-heads", where
        )
        found |= {key: told[key] for key in ("norm_pix", "mask_ratio", "sampling", "masked") if key in told}
    elif head:
        _shape(weights, "head.weight", 2, where)
        found["pool"] = told.get("pool") or ("mean" if "fc_norm.weight" in weights else "class")
    kind: type[EncoderConfig] = ModelConfig if decoder else ClassifierConfig if head else EncoderConfig
    try:
        return kind(**found)
    except ValidationError as error:
        reasons = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise UserError(f"{where} is of no model that is known here: {reasons}") from None


def _shape(weights: Mapping[str, torch.Tensor], name: str, axes: int, where: str) -> tuple[int, ...]:
    if name not in weights:
        keys = ", ".join(list(weights)[:3])
        raise UserError(
            f"{where} has no {name}, so it is no ViT of a layout that is known here (it has {keys}, …)"
        )
    shape = tuple(weights[name].shape)
    if len(shape) != axes or 0 in shape:
        raise UserError(f"{where}: {name} is {list(shape)}, not of {axes} axes")
    return shape


def _heads(width: int, table: dict[int, int], option: str, where: str) -> int:
    if width not in table:
        raise UserError(
            f"{where}: weights do not tell how many heads a width of {width} has, and no published model has that width: "
            f"say it, `maestream import … {option} N`"
        )
    return table[width]


def check_shapes(weights: Mapping[str, torch.Tensor], model: EncoderConfig, where: str) -> None:
    """UserError that lists what weights by our names lack, have in another shape, or have besides."""
    _check_size(weights, model, where)
    classes = next(iter(weights["head.weight"].shape), 1) if "head.weight" in weights else 1
    with torch.device("meta"):
        wanted = network(model, classes).state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [
        f"{name} is {list(weights[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems += [f"{name} is not known" for name in weights if name not in wanted]
    if problems:
        more = f", and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise UserError(f"{where} is no {kind_of(model)} of ours: {'; '.join(problems[:NAMED])}{more}")


def _check_size(weights: Mapping[str, torch.Tensor], model: EncoderConfig, where: str) -> None:
    """UserError where a model is another size than its weights: made, it would take any time and memory."""
    blocks, positions = model.depth, {"pos_embed": model.width}
    if isinstance(model, ModelConfig):
        blocks += model.decoder_depth
        positions["decoder_pos_embed"] = model.decoder_width
    for name, width in positions.items():
        shape, wanted = list(weights[name].shape) if name in weights else [], [1, 1 + model.patches, width]
        if shape != wanted:
            raise UserError(
                f"{where} is no {kind_of(model)} of ours: {name} is {shape or 'missing'}, not {wanted}"
            )
    if len(weights) < 12 * blocks:  # weights of a block
        raise UserError(
            f"{where} is no {kind_of(model)} of ours: it has {len(weights)} weights, too few for {blocks} blocks"
        )


def transformers_config(model: EncoderConfig) -> dict[str, Any]:
    """config.json of ViTMAEConfig or ViTConfig for a model of ours."""
    height, width = model.size
    config: dict[str, Any] = {
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": 3,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": 4 * model.width,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
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


def told_by_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of transformers tells, see `shape_of`."""
    names = {
        "image_size": "image_size",
        "num_attention_heads": "heads",
        "decoder_num_attention_heads": "decoder_heads",
        "mask_ratio": "mask_ratio",
        "norm_pix_loss": "norm_pix",
    }
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def timm_config(model: EncoderConfig, classes: int) -> dict[str, Any]:
    """config.json of a timm ViT: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    size = TIMM.get(model.width, "base")
    patch = {"huge": 14}.get(size, 16)
    pool = "avg" if isinstance(model, ClassifierConfig) and model.pool == "mean" else "token"
    return {
        "architecture": f"vit_{size}_patch{patch}_224",
        "num_classes": classes,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": {
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
            "input_size": [3, *model.size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "mean": list(MEAN),
            "std": list(STD),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def told_by_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of timm tells, see `shape_of`."""
    args = config.get("model_args")
    args = args if isinstance(args, dict) else {}
    names = {"img_size": "image_size", "num_heads": "heads"}
    told = {ours: args[theirs] for theirs, ours in names.items() if theirs in args}
    if isinstance(size := told.get("image_size"), list) and size and size.count(size[0]) == len(size):
        told["image_size"] = size[0]
    if pool := args.get(
        "global_pool", config.get("global_pool")
    ):  # of a head: some read the mean after the norm
        told["pool"] = {"avg": "mean", "token": "class"}.get(str(pool), pool)
    return told
