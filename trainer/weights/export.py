"""Export a model to a folder, in one of the formats of `trainer.weights.formats`.

The config.json is written last (or the README.md, for formats without one): a folder without it is an incomplete export.
"""

import json
import logging
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.storage.store import Store
from trainer.config.model_schema import ClassifierConfig, ModelConfig
from trainer.weights.channels import preprocessor_config
from trainer.weights.formats import ENCODER_ONLY
from trainer.weights.model_card import model_card, output_name
from trainer.weights.pretrained import (
    CONFIG,
    FORMAT_KEY,
    WEIGHTS,
    PretrainedModel,
    build_pretrained,
    config_json,
    encoder_only,
)
from trainer.weights.state_dicts import (
    TRANSFORMERS_CLASSES,
    model_kind,
    timm_config,
    to_transformers,
    transformers_config,
)

CARD = "README.md"
TRANSFORMERS_PROBLEMS = {"classes": "multi_label_classification", "numbers": "regression"}
SAFETENSORS = WEIGHTS[0]
# Bytes of weights above which they are written to a file beside the .onnx: a protobuf file cannot exceed 2 GiB.
MAX_INLINE_BYTES = 1 << 30


def export(pretrained: PretrainedModel, export_format: str, store: Store, without_head: bool = False) -> None:
    """Write a model and its model card to an empty folder.

    Args:
        export_format: one of `trainer.weights.formats.FORMATS`.
        without_head: export the encoder alone, without the decoder of an MAE or the head of a classifier. Formats of
            ENCODER_ONLY always drop a decoder.

    Raises UserError, before anything is written, if the format cannot hold the model or the folder is not empty.
    """
    if names := store.names():
        raise UserError(f"{store.url} is not empty (it has {names[0]}): choose another OUT")
    if without_head or (export_format in ENCODER_ONLY and isinstance(pretrained.model, ModelConfig)):
        pretrained = encoder_only(pretrained)
    _check_format(pretrained, export_format)
    model, weights = pretrained.model, _without_sharing(pretrained.weights)
    config: dict[str, Any] | None = None
    if export_format == "safetensors":
        _write_safetensors(store, weights)
        config = config_json(pretrained.info)
    elif export_format == "transformers":
        _write_safetensors(store, to_transformers(weights, model))
        _write_json(store, "preprocessor_config.json", preprocessor_config(model))
        config = _transformers_config(pretrained)
    elif export_format == "timm":
        _write_safetensors(store, weights)
        config = timm_config(model, len(weights["head.weight"]) if "head.weight" in weights else 0)
    elif export_format == "authors":
        _write_authors(store, pretrained)
    elif export_format == "onnx":
        _write_onnx(store, pretrained)
    else:
        _write_torch_export(store, pretrained)
    store.write(CARD, model_card(pretrained.info, model, export_format).encode())
    if config is not None:
        _write_json(store, CONFIG, config)


def _without_sharing(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous weights that share no memory, because safetensors refuses shared tensors."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in weights.items():
        tensor = tensor.contiguous()
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate


def _check_format(pretrained: PretrainedModel, export_format: str) -> None:
    """Raise UserError if the format cannot hold the model."""
    model, where = pretrained.model, pretrained.info.location
    if isinstance(model, ModelConfig) and export_format in ("transformers", "authors"):
        if model.masked != "nothing":
            raise UserError(
                f"{where}: its encoder is trained with masked patches as input (masked={model.masked}), which {export_format} "
                "does not support: export the encoder alone with --encoder"
            )
        if export_format == "transformers" and model.size[0] != model.size[1]:
            raise UserError(
                f"{where}: transformers' ViTMAE supports square images only, not {model.size[0]} × {model.size[1]}: export "
                "the encoder alone with --encoder"
            )
        if export_format == "authors" and model.channels != 3:
            raise UserError(
                f"{where}: the authors' code for masked autoencoders supports 3 channels only, not {model.channels}: use "
                "--format safetensors or transformers, or export the encoder alone with --encoder"
            )
    if export_format == "transformers" and isinstance(model, ClassifierConfig) and model.pool == "mean":
        raise UserError(
            f"{where}: its head reads the mean of the patches, but transformers' ViT has only heads that read the class token: "
            "use --format timm, authors or safetensors"
        )


def _write_safetensors(store: Store, weights: dict[str, torch.Tensor]) -> None:
    with store.staging(SAFETENSORS) as path:
        save_file(weights, path, metadata={"format": "pt"})  # transformers requires this entry


def _write_json(store: Store, name: str, tree: dict[str, Any]) -> None:
    store.write(name, (json.dumps(tree, indent=1) + "\n").encode())


def _transformers_config(pretrained: PretrainedModel) -> dict[str, Any]:
    kind = model_kind(pretrained.model)
    config = {
        "architectures": [TRANSFORMERS_CLASSES[kind]],
        "model_type": "vit_mae" if kind == "mae" else "vit",
        "dtype": str(pretrained.weights["cls_token"].dtype).removeprefix("torch."),
        **transformers_config(pretrained.model),
    }
    if kind == "classifier":
        names, labels = pretrained.info.classes, pretrained.info.labels
        if labels:
            config["problem_type"] = TRANSFORMERS_PROBLEMS[labels.kind]
        if not isinstance(names, list):
            noun = "number" if labels and labels.kind == "numbers" else "class"
            names = [f"{noun} {i}" for i in range(len(pretrained.weights["head.weight"]))]
        config["id2label"] = dict(enumerate(names))
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def _write_authors(store: Store, pretrained: PretrainedModel) -> None:
    """Write model.pth. It also has our config, as plain values, because the weights alone do not determine it."""
    config = json.loads(json.dumps(config_json(pretrained.info)))
    with store.staging("model.pth") as path:
        torch.save({"model": pretrained.weights, FORMAT_KEY: config}, path)


class _ForwardModule(nn.Module):
    """The module to export: pixels [n, c, h, w] → tokens [n, 1 + L, width] of an encoder, or logits of a classifier."""

    def __init__(self, pretrained: PretrainedModel) -> None:
        super().__init__()
        self.model = build_pretrained(pretrained)
        self.config = pretrained.model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)

    def example(self) -> torch.Tensor:
        """Return an example input. It has two images: with one, torch would fix the batch size to 1."""
        shape = (2, self.config.channels, *self.config.size)
        return torch.zeros(shape, dtype=getattr(torch, self.config.pixel_dtype))


def _write_torch_export(store: Store, pretrained: PretrainedModel) -> None:
    module = _ForwardModule(pretrained).eval()
    batch = {"images": {0: torch.export.Dim("n", min=1)}}
    program = torch.export.export(module, (module.example(),), dynamic_shapes=batch)
    with store.staging("model.pt2") as path, path.open("wb") as file:
        torch.export.save(program, file)


def _write_onnx(store: Store, pretrained: PretrainedModel) -> None:
    module = _ForwardModule(pretrained).eval()
    weight_bytes = sum(tensor.numel() * 4 for tensor in pretrained.weights.values())
    with tempfile.TemporaryDirectory(prefix="maestream-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript", "onnx_ir"):
            logging.getLogger(name).setLevel(logging.ERROR)
        torch.onnx.export(
            module,
            (module.example(),),
            str(Path(folder, "model.onnx")),
            dynamo=True,
            input_names=["images"],
            output_names=[output_name(pretrained.info, pretrained.model)],
            dynamic_shapes={"images": {0: torch.export.Dim("n", min=1)}},
            external_data=weight_bytes > MAX_INLINE_BYTES,
            verbose=False,
        )
        for file in sorted(Path(folder).iterdir(), reverse=True):  # model.onnx.data before model.onnx
            with store.staging(file.name) as path:
                shutil.copyfile(file, path)


def save_native(pretrained: PretrainedModel, store: Store) -> None:
    """Write a maestream model folder whose card describes the model's source and not the run. Raises as `export`."""
    export(replace(pretrained, info=replace(pretrained.info, store=None, run=None)), "safetensors", store)
