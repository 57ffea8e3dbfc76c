"""Read a model with its weights from any of these locations:

run                         a run folder, at any of its checkpoints
maestream model folder      written by `maestream import` or `maestream export --format safetensors`
foreign model folder        written by transformers (ViTMAE, ViT) or timm, with a config.json
weight file                 in a folder, in a bucket or on the web, see `trainer.weights.files`

Parameter names and shapes determine the architecture of foreign weights. Only what they leave open (heads, target
normalisation, …) is taken from the files beside them.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from pipeline.errors import UserError
from pipeline.loading.crops import CENTRE
from pipeline.secrets import without_secrets
from pipeline.storage.faults import as_user_error
from pipeline.storage.store import Store, open_store
from trainer.config.model_schema import ClassifierConfig, EncoderConfig, ModelConfig
from trainer.config.schema import FinetuneConfig, LabelledRunConfig, LinprobeConfig, RunConfig
from trainer.labels.labels import Labels, read_labels
from trainer.models.vit import ViT
from trainer.run.checkpoint import EMA, find_checkpoint, read_optimizer_state, read_weights
from trainer.run.run import CLASSES, read_config
from trainer.run.run import CONFIG as RUN_CONFIG
from trainer.weights.channels import pixel_hints
from trainer.weights.files import IS_PROGRAM, WeightFile, is_http, read_weight_file, split_path
from trainer.weights.state_dicts import (
    Weights,
    build_model,
    check_shapes,
    hints_from_timm,
    hints_from_transformers,
    infer_config,
    is_transformers_layout,
    model_kind,
    to_native,
)

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PROGRAMS = ("model.pt2", "model.onnx")  # in folders of `maestream export --format torch-export` and onnx
FORMAT_KEY = "maestream"  # marks a config.json as ours; the value is the format's version
VERSION = 1
MAX_CONFIG_BYTES = 16 << 20  # 20,000 class names take 1 MB
MODEL_TYPES: dict[str, type[EncoderConfig]] = {
    "mae": ModelConfig,
    "classifier": ClassifierConfig,
    "encoder": EncoderConfig,
}
# The published files with a decoder (mae_visualize_*) were trained on raw pixels.
RAW_PIXELS_ASSUMED = (
    "checkpoints don't record the target type; raw pixels are assumed, as in the published mae_visualize_* files. "
    "Pass --targets normalised if the model predicts normalised pixels"
)


@dataclass(frozen=True)
class ModelInfo:
    """Description of a model, without its weights."""

    location: str  # for messages: without secrets
    model: EncoderConfig  # a ModelConfig for an MAE, a ClassifierConfig for a classifier
    store: Store | None = None  # its folder, if that is a run or a maestream model folder
    step: int | None = None  # step of the run's checkpoint
    run: RunConfig | None = None  # config of the run
    classes: list[str] | int | None = (
        None  # of a classifier: class names (or of numbers) in the order of its outputs, or how many
    )
    source: dict[str, Any] = field(default_factory=dict)  # origin of imported weights
    labels: Labels | None = None  # of a model for several classes or numbers

    @property
    def precision(self) -> str:
        """Precision of the run's training; "auto" without a run."""
        return self.run.precision if self.run else "auto"

    @property
    def crop(self) -> float:
        """Side of the centre crop for evaluation, divided by the image's shorter side."""
        return self.run.data.val_crop if isinstance(self.run, LabelledRunConfig) else CENTRE

    @property
    def label(self) -> str:
        """Name of the model in the output of commands: its step, or its location."""
        return f"step {self.step}" if self.step else self.location


class ConfigJson(BaseModel):
    """Content of a maestream model folder's config.json, besides the format's version."""

    kind: Literal["mae", "classifier", "encoder"]
    model: dict[str, Any]
    classes: list[str] | int | None = None
    step: int | None = None
    source: dict[str, Any] = {}
    labels: Labels | None = None  # not written for one class per image


@dataclass(frozen=True)
class PretrainedModel:
    """A model and its weights."""

    info: ModelInfo
    weights: Weights  # state dict of `trainer.weights.state_dicts.build_model(model)`

    @property
    def model(self) -> EncoderConfig:
        """Architecture of the model."""
        return self.info.model


def read_model_info(location: str, step: int | None = None, already_reached: bool = False) -> ModelInfo:
    """Describe the model of a run or a maestream model folder, without reading its weights.

    Args:
        step: step of the run's checkpoint. Default: the newest.
        already_reached: see `pipeline.storage.store.open_store`.

    Raises UserError if the location is anything else.
    """
    store = None if is_http(location) else open_store(location, already_reached)
    if store and store.exists(RUN_CONFIG):
        return _run_info(store, step)
    config = _read_json(store, CONFIG) if store else None
    if store is None or config is None or FORMAT_KEY not in config:
        where = without_secrets(location)
        raise UserError(
            f"{where} is not a run: it has no {RUN_CONFIG}. Import other projects' models first: `maestream import {where} OUT`"
        )
    _refuse_step(step, store.url)
    return _folder_info(config, store.describe(CONFIG), store)


def read_pretrained(
    location: str,
    step: int | None = None,
    hints: Mapping[str, Any] | None = None,
    already_reached: bool = False,
) -> PretrainedModel:
    """Read a model with its weights from any location that this module lists.

    Args:
        step: step of the run's checkpoint. Default: the newest.
        hints: config values that the location may not tell, see `trainer.weights.state_dicts.infer_config`.
        already_reached: see `pipeline.storage.store.open_store`.

    Raises UserError if there is no model, or if it is damaged, unsafe or not supported.
    """
    hints = hints or {}
    where = without_secrets(location)
    store = None if is_http(location) else open_store(location, already_reached)
    if store and store.exists(RUN_CONFIG):
        return _read_run(_run_info(store, step))
    config = _read_json(store, CONFIG) if store else None
    _refuse_step(step, where)
    if store and config is not None:
        return _read_folder(store, config, where, hints)
    if store and any(store.exists(name) for name in PROGRAMS):
        raise UserError(f"{where} {IS_PROGRAM}")
    if store and not _is_file(store):
        raise UserError(f"{where} is not a run, a model folder or a weight file")
    try:
        file = read_weight_file(location)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    config = file.extras.get(FORMAT_KEY)
    if isinstance(config, dict):
        return _checked(_folder_info(config, where, None), file.tensors)
    return _convert_foreign(file, where, {**hints, **_hints_from_args(file.extras.get("args"))})


def _read_folder(
    store: Store, config: dict[str, Any], where: str, hints: Mapping[str, Any]
) -> PretrainedModel:
    """Read a model folder, ours or a foreign one, with this config.json."""
    name = next((name for name in WEIGHTS if store.exists(name)), None)
    if name is None:
        raise UserError(
            f"{where} has a {CONFIG}, but no {' or '.join(WEIGHTS)}: weights split into several files are not supported"
        )
    file = read_weight_file(store.describe(name))
    if FORMAT_KEY in config:
        return _checked(_folder_info(config, store.describe(CONFIG), store), file.tensors)
    return _convert_foreign(
        file, where, {**hints, **_hints_from_config(config, where), **_pixel_hints(store, config)}
    )


def model_exists(location: str) -> bool:
    """Return whether a model folder or a file exists there. Raise UserError if storage cannot be reached."""
    store = open_store(location)
    if is_http(location):
        with as_user_error(without_secrets(location)):
            return bool(store.fs.exists(store.root))
    return store.exists(CONFIG) or _is_file(store)


def _is_file(store: Store) -> bool:
    folder, name = split_path(store.url)
    with as_user_error(store.url):
        return bool(folder.fs.isfile(folder.path(name)))


def _refuse_step(step: int | None, where: str) -> None:
    if step is not None:
        raise UserError(f"{where} is not a run and has no checkpoints: omit the step")


def _read_json(store: Store, name: str) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file."""
    if not store.exists(name):
        return None
    try:
        config = json.loads(store.read(name)) if store.size(name) <= MAX_CONFIG_BYTES else None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{store.describe(name)} is damaged: download it again, or use another model")
    return config


def _run_info(store: Store, step: int | None) -> ModelInfo:
    run = read_config(store)
    model = run.model
    if isinstance(run, LinprobeConfig):  # the linear layer is not part of the ViT
        model = run.model.encoder
    try:
        classes = json.loads(store.read(CLASSES)) if isinstance(run, FinetuneConfig) else None
    except (FileNotFoundError, ValueError):
        classes = None
    labels = read_labels(store) if isinstance(run, LabelledRunConfig) else None
    return ModelInfo(store.url, model, store, find_checkpoint(store, step), run, classes, labels=labels)


def _read_run(info: ModelInfo) -> PretrainedModel:
    """Read a checkpoint: the averaged weights if the run has them, and a linear probe's encoder without the head.

    A head for numbers predicts them in original units.
    """
    assert info.store is not None
    assert info.step is not None
    weights = read_weights(info.store, info.step)
    if isinstance(info.run, FinetuneConfig) and info.run.optim.ema:
        weights |= read_optimizer_state(info.store, info.step, EMA)
    if isinstance(info.run, LinprobeConfig):
        prefix = "encoder."
        weights = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    elif info.labels:
        weights["head.weight"], weights["head.bias"] = info.labels.head_in_units(
            weights["head.weight"], weights["head.bias"]
        )
    return _checked(info, weights)


def _folder_info(config: Mapping[str, Any], where: str, store: Store | None) -> ModelInfo:
    """Validate a config that `config_json` made. `where` is its location, for messages."""
    if (version := config.get(FORMAT_KEY)) != VERSION:
        raise UserError(
            f"{where} has format version {str(version)[:20]}; this version of maestream reads {VERSION}"
        )
    try:
        content = ConfigJson.model_validate(config)
        model = MODEL_TYPES[content.kind].model_validate(content.model)
    except ValidationError as error:
        raise UserError(f"{where} is damaged ({' '.join(str(error).split())[:200]})") from None
    location = store.url if store else where
    source = content.source | ({"step": content.step} if content.step else {})
    location = without_secrets(location)
    return ModelInfo(location, model, store, classes=content.classes, source=source, labels=content.labels)


def config_json(info: ModelInfo) -> dict[str, Any]:
    """Return the config.json of a maestream model folder."""
    content = ConfigJson(
        kind=model_kind(info.model),
        model=info.model.model_dump(mode="json"),
        classes=info.classes,
        step=info.step,
        source=info.source,
        labels=info.labels,
    )
    return {
        FORMAT_KEY: VERSION,
        **content.model_dump(mode="json", exclude=None if info.labels else {"labels"}),
    }


def _hints_from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the hints that a config.json of transformers or timm has. Raise UserError if the model is not supported."""
    if "architecture" in config:
        return hints_from_timm(config)
    if config.get("model_type") not in ("vit_mae", "vit"):
        raise UserError(
            f"{where} has a model of type {config.get('model_type')}; supported are vit_mae and vit"
        )
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise UserError(f"{where} has the activation {str(activation)[:40]}; only gelu is supported")
    return hints_from_transformers(config)


def _hints_from_args(args: Any) -> dict[str, Any]:
    """Return the hints in the `args` of the authors' training checkpoints (their main_pretrain.py)."""
    if not isinstance(args, argparse.Namespace):
        return {}
    names = {"norm_pix_loss": "norm_pix", "mask_ratio": "mask_ratio"}
    return {ours: getattr(args, theirs) for theirs, ours in names.items() if hasattr(args, theirs)}


def _pixel_hints(store: Store, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hints on pixels and their normalisation in a foreign model folder."""
    return pixel_hints(config, _read_json(store, "preprocessor_config.json") or {})


def read_initial_model(location: str, step: int | None) -> EncoderConfig | None:
    """Describe the images of the model that a run starts from, without reading weights: a config with its channels, the type
    of its pixels and their normalisation. None if only the weights could tell."""
    store = None if is_http(location) else open_store(location)
    if store is None:
        return None
    if store.exists(RUN_CONFIG):
        return _run_info(store, step).model
    config = _read_json(store, CONFIG)
    if config is None:
        return None
    if FORMAT_KEY in config:
        return _folder_info(config, store.describe(CONFIG), store).model
    hints = _pixel_hints(store, config)
    try:
        return EncoderConfig(channels=len(hints["pixel_mean"]), **hints) if "pixel_mean" in hints else None
    except (ValidationError, TypeError):
        return None  # reported when the weights are read


def _convert_foreign(file: WeightFile, where: str, hints: Mapping[str, Any]) -> PretrainedModel:
    """Convert the weights of another project, and record in `source` where they come from and what was assumed."""
    weights = to_native(file.tensors, where)
    if not any(name.startswith("decoder_") for name in weights):
        weights.pop("mask_token", None)  # some encoder files have one
    model = infer_config(weights, where, {"norm_pix": False, **hints})
    assumptions = [RAW_PIXELS_ASSUMED] if isinstance(model, ModelConfig) and "norm_pix" not in hints else []
    if model.pixel_mean is None and model.channels != 3:
        assumptions.append(
            f"the files do not say how the model normalises its {model.channels} channels: pixels are only scaled to [0, 1]"
        )
    source: dict[str, Any] = {
        # Without folder and query: the model card is public, and they may be private.
        "file": where.partition("?")[0] if is_http(where) else where.rpartition("/")[2],
        "sha256": file.sha256,
        "layout": "transformers" if is_transformers_layout(file.tensors) else "MAE authors or timm",
        "taken": assumptions,
    }
    classes = len(weights["head.weight"]) if isinstance(model, ClassifierConfig) else None
    return _checked(ModelInfo(where, model, classes=classes, source=source), weights)


def _checked(info: ModelInfo, weights: Weights) -> PretrainedModel:
    """Return the model. Raise UserError if its weights do not match its config and class names."""
    check_shapes(weights, info.model, info.location)
    if isinstance(info.classes, list) and len(info.classes) != (outputs := len(weights["head.weight"])):
        raise UserError(
            f"{info.location} is damaged: it has {len(info.classes)} class names, but its head has {outputs} outputs"
        )
    return PretrainedModel(info, weights)


def build_pretrained(pretrained: PretrainedModel) -> ViT:
    """Build an MAE, Classifier or Encoder and load its weights. Returns it in evaluation mode, on the CPU."""
    head = pretrained.weights.get("head.weight")
    model = build_model(pretrained.model, classes=1 if head is None else len(head))
    model.load_state_dict(pretrained.weights)
    return model.eval()


def encoder_only(pretrained: PretrainedModel) -> PretrainedModel:
    """Drop the decoder of an MAE, or the head of a classifier.

    Raises UserError for a mean-pooled classifier: its last norm (fc_norm) was trained on the mean of the patch tokens, and it
    has no norm for the tokens themselves.
    """
    model = pretrained.model
    if isinstance(model, ClassifierConfig) and model.pool == "mean":
        raise UserError(
            f"{pretrained.info.location}: mean-pooled classifier (fc_norm): the encoder cannot be separated from the head; "
            "use the whole classifier"
        )
    dropped = ("decoder_", "mask_token", "head.")
    weights = {name: tensor for name, tensor in pretrained.weights.items() if not name.startswith(dropped)}
    return PretrainedModel(replace(pretrained.info, model=model.encoder, classes=None, labels=None), weights)
