"""Weights for others, in the formats that they read (trainer.formats). An export is a folder; what says what it is, its
config.json or its card, comes last."""

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
from pipeline.storage import Store
from trainer.card import model_card
from trainer.config import ClassifierConfig, EncoderConfig, ModelConfig
from trainer.formats import ENCODER_ONLY
from trainer.layouts import kind_of, network, timm_config, to_transformers, transformers_config
from trainer.pretrained import CONFIG, OURS, WEIGHTS, Pretrained, encoder_alone, stated
from trainer.vit import MEAN, STD

CARD = "README.md"
MODEL = WEIGHTS[0]
ONE_FILE = 1 << 30  # bytes of weights that go into the .onnx itself: protobuf ends at 2 GiB
CLASSES = {"mae": "ViTMAEForPreTraining", "classifier": "ViTForImageClassification", "encoder": "ViTModel"}
USE = {
    "safetensors": "from trainer.pretrained import encoder_of\n\ntokens = encoder_of(FOLDER)(images)",
    "timm": "import timm\n\nmodel = timm.create_model('local-dir:' + FOLDER, pretrained=True)",
    "authors": "import torch\n\nmodel.load_state_dict(torch.load(FOLDER + '/model.pth')['model'])",
    "onnx": "import onnxruntime\n\n"
    "session = onnxruntime.InferenceSession(FOLDER + '/model.onnx')\n(said,) = session.run(None, {'images': images})",
    "torch-export": "import torch\n\nsaid = torch.export.load(FOLDER + '/model.pt2').module()(images)",
}


def export(found: Pretrained, form: str, store: Store, encoder: bool = False) -> None:
    """Write a model in one of trainer.formats.FORMATS into a folder.

    Args:
        encoder: without the decoder of an MAE, or the head of a classifier.

    UserError, before anything is written, where the format has no place for it, or the folder is not empty.
    """
    if names := store.names():
        raise UserError(f"{store.url} is not empty ({names[0]}, …): choose another OUT")
    if encoder or (form in ENCODER_ONLY and isinstance(found.model, ModelConfig)):
        found = encoder_alone(found)
    _refuse_misfits(found, form)
    weights = _apart(found.weights)
    if form == "safetensors":
        _write_safetensors(store, weights)
        config: dict[str, Any] | None = stated(found.about)
    elif form == "transformers":
        _write_safetensors(store, to_transformers(weights, found.model))
        _write_json(store, "preprocessor_config.json", _preprocessor(found.model))
        config = _transformers_config(found)
    elif form == "timm":
        _write_safetensors(store, weights)
        config = timm_config(found.model, len(weights["head.weight"]) if "head.weight" in weights else 0)
    else:
        config = None
        {"authors": _write_authors, "onnx": _write_onnx, "torch-export": _write_program}[form](store, found)
    store.write(
        CARD,
        model_card(found.about, found.model, form, f"```python\n{_use(form, found.model)}\n```").encode(),
    )
    if config is not None:
        _write_json(store, CONFIG, config)


def _apart(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that have no memory in common, as a file of safetensors has to have them."""
    seen: set[int] = set()
    found = {}
    for name, tensor in weights.items():
        tensor = tensor.contiguous()
        where = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if where in seen else tensor
        seen.add(where)
    return found


def _use(form: str, model: EncoderConfig) -> str:
    """Python that loads an export."""
    if form == "transformers":
        name = CLASSES[kind_of(model)]
        how = ", add_pooling_layer=False" if name == "ViTModel" else ""
        return f"from transformers import {name}\n\nmodel = {name}.from_pretrained(FOLDER{how})"
    if form == "safetensors" and isinstance(model, ClassifierConfig):
        return "from trainer.pretrained import read_pretrained\n\nweights = read_pretrained(FOLDER).weights"
    return USE[form]


def _refuse_misfits(found: Pretrained, form: str) -> None:
    model, where = found.model, found.about.where
    if isinstance(model, ModelConfig) and form in ("transformers", "authors"):
        if model.masked != "nothing":
            raise UserError(
                f"{where}: its encoder sees masked patches ({model.masked}), which {form} has no model for: --encoder"
            )
        if form == "transformers" and model.size[0] != model.size[1]:
            raise UserError(
                f"{where}: transformers' ViTMAE is for square images, not {model.size[0]} × {model.size[1]}: --encoder"
            )
    if form == "transformers" and isinstance(model, ClassifierConfig) and model.pool == "mean":
        raise UserError(
            f"{where}: its head reads the mean of the patches, and transformers' ViT that of the class token alone: take timm, "
            "authors or safetensors"
        )


def _write_safetensors(store: Store, weights: dict[str, torch.Tensor]) -> None:
    with store.staging(MODEL) as path:
        save_file(weights, path, metadata={"format": "pt"})  # without which transformers does not read it


def _write_json(store: Store, name: str, tree: dict[str, Any]) -> None:
    store.write(name, (json.dumps(tree, indent=1) + "\n").encode())


def _transformers_config(found: Pretrained) -> dict[str, Any]:
    kind = kind_of(found.model)
    config = {
        "architectures": [CLASSES[kind]],
        "model_type": "vit_mae" if kind == "mae" else "vit",
        "dtype": str(found.weights["cls_token"].dtype).removeprefix("torch."),
        **transformers_config(found.model),
    }
    if kind == "classifier":
        known = found.about.classes
        names = (
            known
            if isinstance(known, list)
            else [f"class {i}" for i in range(len(found.weights["head.weight"]))]
        )
        config["id2label"] = dict(enumerate(names))
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def _preprocessor(model: EncoderConfig) -> dict[str, Any]:
    height, width = model.size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def _write_authors(store: Store, found: Pretrained) -> None:
    """With our config beside the weights, as plain values: what it tells is not in the weights."""
    beside = json.loads(json.dumps(stated(found.about)))
    with store.staging("model.pth") as path:
        torch.save({"model": found.weights, OURS: beside}, path)


class _Asked(nn.Module):
    """uint8[n, 3, h, w] → the tokens of an encoder, float32[n, 1 + L, width], or the logits of a classifier."""

    def __init__(self, found: Pretrained) -> None:
        super().__init__()
        classes = len(found.weights["head.weight"]) if "head.weight" in found.weights else 1
        self.model = network(found.model, classes)
        self.model.load_state_dict(found.weights)
        self.size = found.model.size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)

    def example(self) -> torch.Tensor:
        return torch.zeros(
            2, 3, *self.size, dtype=torch.uint8
        )  # of one image, torch would take the batch for fixed


def _write_program(store: Store, found: Pretrained) -> None:
    asked = _Asked(found).eval()
    batch = {"images": {0: torch.export.Dim("n", min=1)}}
    program = torch.export.export(asked, (asked.example(),), dynamic_shapes=batch)
    with store.staging("model.pt2") as path, path.open("wb") as file:
        torch.export.save(program, file)


def _write_onnx(store: Store, found: Pretrained) -> None:
    asked = _Asked(found).eval()
    apart = sum(tensor.numel() * 4 for tensor in found.weights.values()) > ONE_FILE
    with tempfile.TemporaryDirectory(prefix="maestream-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript", "onnx_ir"):
            logging.getLogger(name).setLevel(logging.ERROR)
        torch.onnx.export(
            asked,
            (asked.example(),),
            str(Path(folder, "model.onnx")),
            dynamo=True,
            input_names=["images"],
            output_names=["logits" if isinstance(found.model, ClassifierConfig) else "tokens"],
            dynamic_shapes={"images": {0: torch.export.Dim("n", min=1)}},
            external_data=apart,
            verbose=False,
        )
        for file in sorted(Path(folder).iterdir(), reverse=True):  # what the .onnx refers to before it
            with store.staging(file.name) as path:
                shutil.copyfile(file, path)


def imported(found: Pretrained, store: Store) -> None:
    """Write a model in our own format, see `export`."""
    export(replace(found, about=replace(found.about, store=None, run=None)), "safetensors", store)
