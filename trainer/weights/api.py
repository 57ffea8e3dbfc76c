"""Python API for trained models. Import these functions from `maestream`:

    from maestream import load_encoder

    tokens = load_encoder("runs/base")(images)

A location is a run folder, a model folder of `maestream import` or `maestream export --format safetensors`, or a file or folder
with weights of the MAE authors, timm or transformers; each a local path or a URL. Models are returned in evaluation mode, on the
CPU. Move them with `.to("cuda")`. They raise ValueError for images of another dtype or size.
"""

from typing import Any

import torch

from pipeline.errors import UserError
from trainer.config.schema import LinprobeConfig
from trainer.models.classifier import Classifier, Encoder
from trainer.models.mae import MAE
from trainer.models.probe import Probe
from trainer.models.vit import ViT
from trainer.run.checkpoint import read_weights
from trainer.weights.pretrained import (
    ModelInfo,
    build_pretrained,
    encoder_only,
    read_model_info,
    read_pretrained,
)

__all__ = ["UserError", "load_classifier", "load_encoder", "load_mae", "read_model_info"]


def load_encoder(location: str, step: int | None = None) -> Encoder:
    """Load the encoder of any model except a mean-pooled classifier, which has no norm for separate tokens.

    The encoder maps images to float[n, 1 + L, width]: the class token, then the L patch tokens. Images are tensors [n, c, h, w]
    with as many channels and of the same type as in training: uint8[n, 3, h, w] for RGB images of 8 bits.

    Args:
        step: step of the run's checkpoint. Default: the newest.

    Raises UserError if there is no such model, or if it is damaged, unsafe or not supported.
    """
    encoder = build_pretrained(encoder_only(read_pretrained(location, step)))
    assert isinstance(encoder, Encoder)
    encoder.register_forward_pre_hook(_check_uint8, with_kwargs=True)
    return encoder


def load_mae(location: str, step: int | None = None) -> MAE:
    """Load a masked autoencoder, encoder and decoder. Arguments and errors as `load_encoder`."""
    pretrained = read_pretrained(location, step)
    mae = build_pretrained(pretrained)
    if not isinstance(mae, MAE):
        raise UserError(f"{pretrained.info.location} is not a masked autoencoder: it has no decoder")
    mae.register_forward_pre_hook(_check_uint8_or_normalised, with_kwargs=True)
    return mae


def load_classifier(location: str, step: int | None = None) -> Classifier | Probe:
    """Load a fine-tuned model with its head or, from a linear-probing run, the frozen encoder with its linear layer.

    It maps images, as `load_encoder` describes them, to logits [n, classes], or to numbers [n, k] in original units if it was
    trained on numbers. `read_model_info(location)` has the class names of a fine-tuned classifier in `classes`, if they are known,
    and `labels`, which says what several classes or numbers are predicted (None: one class). Arguments and errors as
    `load_encoder`.
    """
    pretrained = read_pretrained(location, step)
    if isinstance(pretrained.info.run, LinprobeConfig):
        probe = load_probe(pretrained.info)
        probe.encoder.register_forward_pre_hook(_check_uint8, with_kwargs=True)
        return probe
    classifier = build_pretrained(pretrained)
    if not isinstance(classifier, Classifier):
        raise UserError(f"{pretrained.info.location} is not a classifier: it has no head")
    classifier.register_forward_pre_hook(_check_uint8_or_normalised, with_kwargs=True)
    return classifier


def _check_uint8(model: ViT, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless the images have the model's type, channels and size. A hook of `forward`."""
    _check_images(model, kwargs["images"] if "images" in kwargs else args[0], "")


def _check_uint8_or_normalised(model: ViT, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Like `_check_uint8`, for models that also take floats that are already normalised."""
    images = kwargs["images"] if "images" in kwargs else args[0]
    _check_images(model, images, "; or floats that are already normalised")


def _check_images(model: ViT, images: torch.Tensor, or_floats: str) -> None:
    height, width = (side * model.patch_size for side in model.grid)
    if model.pixel_dtype == "float32":
        or_floats = ""  # floats are pixels
    valid_dtype = str(images.dtype) == f"torch.{model.pixel_dtype}" or (
        or_floats and images.is_floating_point()
    )
    if not valid_dtype or images.ndim != 4 or images.shape[1:] != (model.channels, height, width):
        got = f"{str(images.dtype).removeprefix('torch.')}{list(images.shape)}"
        wanted = f"{model.pixel_dtype}[n, {model.channels}, {height}, {width}]"
        raise ValueError(f"images must be {wanted}{or_floats}; got {got}")


def load_probe(info: ModelInfo) -> Probe:
    """Load the encoder and the linear layer of a linear-probing run, described by `read_model_info`.

    A layer for numbers predicts them in original units.
    """
    assert isinstance(info.run, LinprobeConfig)
    assert info.store is not None
    assert info.step is not None
    weights = read_weights(info.store, info.step)
    probe = Probe(info.run, len(weights["linear.weight"]))
    probe.load_state_dict(weights)
    if info.labels:
        weight, bias = info.labels.head_in_units(weights["linear.weight"], weights["linear.bias"])
        probe.linear.weight.data.copy_(weight)
        probe.linear.bias.data.copy_(bias)
    return probe.eval()
