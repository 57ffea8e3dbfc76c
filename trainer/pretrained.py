"""What somebody has trained, wherever it lies.

    a run                     of ours, at any of its commits
    a folder with our config  what `maestream import` makes, and `maestream export --format safetensors`
    a folder of others        of transformers (ViTMAE, ViT) or timm, with config.json
    a file                    in a folder, a bucket or on the web, see trainer.weight_files

What weights are is told by their keys and shapes; only what those do not tell is taken from what lies beside them.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ValidationError

from pipeline.augment import CENTRE
from pipeline.errors import UserError
from pipeline.secrets import without_secrets
from pipeline.storage import Store, explained, open_store
from trainer.checkpoint import EMA, chosen_step, read_state, read_weights
from trainer.classifier import Encoder
from trainer.config import (
    ClassifierConfig,
    EncoderConfig,
    FinetuneConfig,
    LabelledRunConfig,
    LinprobeConfig,
    ModelConfig,
    RunConfig,
)
from trainer.layouts import (
    Weights,
    check_shapes,
    is_transformers,
    kind_of,
    shape_of,
    to_ours,
    told_by_timm,
    told_by_transformers,
)
from trainer.run import CLASSES, read_config
from trainer.run import CONFIG as RUN_CONFIG
from trainer.vit import MEAN
from trainer.weight_files import WeightFile, beside, is_http, read_weight_file

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
OURS = "maestream"  # the key of our config.json that says so; its value is the format's version
VERSION = 1
MOST_BYTES = 16 << 20  # of a config; the names of 20,000 classes are 1 MB
SHAPES: dict[str, type[EncoderConfig]] = {
    "mae": ModelConfig,
    "classifier": ClassifierConfig,
    "encoder": EncoderConfig,
}
PIXELS = (
    "targets are taken to be plain pixels, as those of the published files with a decoder (mae_visualize_*): the weights "
    "do not tell, and --targets says otherwise"
)


@dataclass(frozen=True)
class About:
    """What a model is, without its weights."""

    where: str  # for people: without secrets
    model: EncoderConfig  # a ModelConfig of an MAE, a ClassifierConfig of a classifier
    store: Store | None = None  # the folder that it lies in, if that is ours
    step: int | None = None  # of the run's commit
    run: RunConfig | None = None  # the config of the run that it lies in
    # Of a classifier: their names in the order of its answers, or how many, where the names are not known.
    classes: list[str] | int | None = None
    source: dict[str, Any] = field(default_factory=dict)  # what others' files it was made from

    @property
    def precision(self) -> str:
        return self.run.precision if self.run else "auto"

    @property
    def crop(self) -> float:
        """Side of the centred square that it is shown, over the shorter side."""
        return self.run.data.val_crop if isinstance(self.run, LabelledRunConfig) else CENTRE

    @property
    def said(self) -> str:
        return f"step {self.step}" if self.step else self.where


class Stated(BaseModel):
    """What our config.json says of a model, besides its version."""

    kind: Literal["mae", "classifier", "encoder"]
    model: dict[str, Any]
    classes: list[str] | int | None = None
    step: int | None = None
    source: dict[str, Any] = {}


@dataclass(frozen=True)
class Pretrained:
    about: About
    weights: Weights  # by our names, as `trainer.layouts.network` of the model has them

    @property
    def model(self) -> EncoderConfig:
        return self.about.model


def describe(place: str, step: int | None = None, known: bool = False) -> About:
    """What lies in a run's or a model's folder of ours, without reading weights. UserError where that is something else.

    Args:
        step: of the run's commit; the newest without it.
        known: see `pipeline.storage.open_store`.
    """
    store = None if is_http(place) else open_store(place, known)
    if store and store.exists(RUN_CONFIG):
        return _about_run(store, step)
    config = _config(store) if store else None
    if store is None or config is None or OURS not in config:
        where = without_secrets(place)
        raise UserError(
            f"{where} is not a run: it has no {RUN_CONFIG}. A model of others is imported first, `maestream import {where} OUT`"
        )
    _refuse_step(step, store.url)
    return _about_ours(config, store.describe(CONFIG), store)


def read_pretrained(
    place: str, step: int | None = None, told: Mapping[str, Any] | None = None, known: bool = False
) -> Pretrained:
    """A model with its weights, from any of the places above.

    Args:
        told: what nothing there may tell, see `trainer.layouts.shape_of`.

    UserError, with the reason, where there is none, or it is damaged, hostile or of a shape that is not known here.
    """
    told = told or {}
    where = without_secrets(place)
    store = None if is_http(place) else open_store(place, known)
    if store and store.exists(RUN_CONFIG):
        return _of_run(_about_run(store, step))
    config = _config(store) if store else None
    _refuse_step(step, where)
    if store and config is not None:
        name = next((name for name in WEIGHTS if store.exists(name)), None)
        if name is None:
            raise UserError(
                f"{where} has a {CONFIG} and no {' or '.join(WEIGHTS)}: weights in several files are not read"
            )
        file = read_weight_file(store.describe(name))
        if OURS in config:
            return _checked(_about_ours(config, store.describe(CONFIG), store), file.tensors)
        return _of_others(file, where, {**told, **_told_by(config, where)}, _pixel_mean(store, config))
    if store and not _is_file(store):
        raise UserError(f"{where} is not a run, not a folder of a model and not a file of weights")
    try:
        file = read_weight_file(place)
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such file") from None
    stated = file.beside.get(OURS)
    if isinstance(stated, dict):
        return _checked(_about_ours(stated, where, None), file.tensors)
    return _of_others(file, where, {**told, **_told_by_args(file.beside.get("args"))})


def is_model(place: str) -> bool:
    """Whether a folder of a model or a file lies there, and no run. UserError where storage does not let it be asked."""
    store = open_store(place)
    if is_http(place):
        with explained(without_secrets(place)):
            return bool(store.fs.exists(store.root))
    return store.exists(CONFIG) or _is_file(store)


def _is_file(store: Store) -> bool:
    folder, name = beside(store.url)
    with explained(store.url):
        return bool(folder.fs.isfile(folder.path(name)))


def _refuse_step(step: int | None, where: str) -> None:
    if step is not None:
        raise UserError(f"{where} is not a run: it has no steps to choose from")


def _config(store: Store, name: str = CONFIG) -> dict[str, Any] | None:
    if not store.exists(name):
        return None
    try:
        config = json.loads(store.read(name)) if store.size(name) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{store.describe(name)} is damaged: get it again, or another")
    return config


def _about_run(store: Store, step: int | None) -> About:
    run = read_config(store)
    model = run.model
    if isinstance(run, LinprobeConfig):  # its linear layer is no part of a ViT
        model = run.model.encoder
    try:
        classes = json.loads(store.read(CLASSES)) if isinstance(run, FinetuneConfig) else None
    except (FileNotFoundError, ValueError):
        classes = None
    return About(store.url, model, store, chosen_step(store, step), run, classes)


def _of_run(about: About) -> Pretrained:
    """Of a commit: the averaged weights, if those are what is evaluated."""
    assert about.store is not None
    assert about.step is not None
    weights = read_weights(about.store, about.step)
    if isinstance(about.run, FinetuneConfig) and about.run.optim.ema:
        weights |= read_state(about.store, about.step, EMA)
    if isinstance(about.run, LinprobeConfig):
        of = "encoder."
        weights = {name.removeprefix(of): t for name, t in weights.items() if name.startswith(of)}
    return _checked(about, weights)


def _about_ours(config: Mapping[str, Any], where: str, store: Store | None) -> About:
    """What a config says that `stated` made."""
    if (version := config.get(OURS)) != VERSION:
        raise UserError(f"{where} has version {str(version)[:20]} of the format, this reads {VERSION}")
    try:
        says = Stated.model_validate(config)
        model = SHAPES[says.kind].model_validate(says.model)
    except ValidationError as error:
        raise UserError(f"{where} is damaged ({' '.join(str(error).split())[:200]})") from None
    place = store.url if store else where
    source = says.source | ({"step": says.step} if says.step else {})
    return About(without_secrets(place), model, store, classes=says.classes, source=source)


def stated(about: About) -> dict[str, Any]:
    """What our config.json says of a model."""
    return {
        OURS: VERSION,
        **Stated(
            kind=kind_of(about.model),
            model=about.model.model_dump(mode="json"),
            classes=about.classes,
            step=about.step,
            source=about.source,
        ).model_dump(),
    }


def _told_by(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a config.json of others tells."""
    if "architecture" in config:
        return told_by_timm(config)
    if config.get("model_type") not in ("vit_mae", "vit"):
        raise UserError(
            f"{where} has a model of type {config.get('model_type')}; vit_mae and vit are known here"
        )
    if (said := config.get("hidden_act", "gelu")) != "gelu":
        raise UserError(f"{where} has {str(said)[:40]} between the layers of its blocks; gelu is known here")
    return told_by_transformers(config)


def _told_by_args(args: Any) -> dict[str, Any]:
    """What the arguments in the authors' training checkpoints tell (their main_pretrain.py)."""
    if not isinstance(args, argparse.Namespace):
        return {}
    names = {"norm_pix_loss": "norm_pix", "mask_ratio": "mask_ratio"}
    return {ours: getattr(args, theirs) for theirs, ours in names.items() if hasattr(args, theirs)}


def _pixel_mean(store: Store, config: Mapping[str, Any]) -> Any:
    """By which pixels were normalised, as far as timm's config or transformers' preprocessor tells."""
    if "pretrained_cfg" in config:
        told = config["pretrained_cfg"]
        return told.get("mean") if isinstance(told, dict) else None
    return (_config(store, "preprocessor_config.json") or {}).get("image_mean")


def _of_others(file: WeightFile, where: str, told: Mapping[str, Any], mean: Any = None) -> Pretrained:
    weights = to_ours(file.tensors, where)
    if not any(name.startswith("decoder_") for name in weights):
        weights.pop("mask_token", None)  # some encoders were saved with it
    model = shape_of(weights, where, {"norm_pix": False, **told})
    taken = [PIXELS] if isinstance(model, ModelConfig) and "norm_pix" not in told else []
    if mean and mean != list(MEAN):
        taken.append(
            f"its pixels had a mean of {mean} when it was trained; here they have ImageNet's, {list(MEAN)}"
        )
    source: dict[str, Any] = {
        # Not where it lies, nor what a URL has besides: a card tells it to everybody.
        "file": where.partition("?")[0] if is_http(where) else where.rpartition("/")[2],
        "sha256": file.sha256,
        "layout": "transformers'" if is_transformers(file.tensors) else "the authors', or timm's",
        "taken": taken,
    }
    classes = len(weights["head.weight"]) if isinstance(model, ClassifierConfig) else None
    return _checked(About(where, model, classes=classes, source=source), weights)


def _checked(about: About, weights: Weights) -> Pretrained:
    check_shapes(weights, about.model, about.where)
    if isinstance(about.classes, list) and len(about.classes) != (heads := len(weights["head.weight"])):
        raise UserError(f"{about.where} names {len(about.classes)} classes, and its head has {heads}")
    return Pretrained(about, weights)


def encoder_alone(found: Pretrained) -> Pretrained:
    """The encoder of a model. UserError where its last norm was trained on the mean of the patches."""
    model = found.model
    if isinstance(model, ClassifierConfig) and model.pool == "mean":
        raise UserError(
            f"{found.about.where}: its head reads the mean of the patches, and there is a norm of that mean alone (fc_norm), "
            "none of the tokens: it goes as a whole"
        )
    apart = ("decoder_", "mask_token", "head.")
    weights = {name: tensor for name, tensor in found.weights.items() if not name.startswith(apart)}
    return Pretrained(replace(found.about, model=model.encoder, classes=None), weights)


def resized_model(model: EncoderConfig, size: tuple[int, int], option: str) -> EncoderConfig:
    """The same model for other images. UserError where its patches do not divide them."""
    try:
        return type(model).model_validate({**model.model_dump(), "image_size": size})
    except ValidationError as error:
        reasons = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise UserError(f"{option}: {reasons}") from None


def resized(found: Pretrained, size: tuple[int, int], option: str = "--image-size") -> Pretrained:
    """A model for other images, height and width in pixels: positions are interpolated, patches stay as large as they are."""
    model = resized_model(found.model, size, option)
    weights = dict(found.weights)
    for name in {"pos_embed", "decoder_pos_embed"} & weights.keys():
        weights[name] = interpolated(weights[name], found.model.grid, model.grid)
    return Pretrained(replace(found.about, model=model), weights)


def interpolated(positions: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Positions float[1, 1 + L, width] of one grid of patches (rows, columns) for another, by bicubic interpolation; the
    class token's stays (the authors' util/pos_embed.py)."""
    if old == new:
        return positions
    cls, patches = positions[:, :1], positions[:, 1:]
    image = patches.unflatten(1, old).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls, image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def encoder_of(place: str, step: int | None = None) -> Encoder:
    """The encoder of a run, a folder or a file, ready to be asked: uint8[n, 3, h, w] → float[n, 1 + L, width], the class
    token and the patches. UserError as `read_pretrained`."""
    found = encoder_alone(read_pretrained(place, step))
    encoder = Encoder(found.model)
    encoder.load_state_dict(found.weights)
    return encoder.eval()
