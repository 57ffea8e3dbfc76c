"""Pixels: which images a model takes, and how they are normalised.

Both are decided when a run first starts, and stored in its config (`model.pixel_dtype`, `model.pixel_mean`,
`model.pixel_std`), so that all later commands use the same without the training dataset.
"""

from typing import cast

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.statistics import format_values, read_statistics
from pipeline.errors import UserError
from pipeline.images.pixels import RGB, Pixels
from pipeline.text import plural
from trainer.config.model_schema import EncoderConfig
from trainer.config.recipe import ConfigT, parse_config
from trainer.config.schema import NormaliseConfig
from trainer.models.vit import pixel_statistics


def resolve_pixels(config: ConfigT, dataset: Dataset, initial: EncoderConfig | None = None) -> ConfigT:
    """Return the config of a new run with the type of its pixels and their normalisation filled in.

    Args:
        initial: the model that the run starts from, as far as it is known. Its normalisation is the default.

    Raises UserError if the model cannot take the dataset's images, or if their statistics are needed and missing.
    """
    model, pixels = config.model, dataset.manifest.pixels
    check_channels(model, dataset)
    bits = (
        pixels.bits if pixels.dtype == "uint16" else RGB.bits
    )  # of 8-bit images they do not matter any more
    taken = Pixels(channels=model.channels, dtype=pixels.dtype, bits=bits)
    source = config.data.normalise
    if source is None and model.pixel_mean is not None and model.pixel_std is not None:
        source = NormaliseConfig(mean=model.pixel_mean, std=model.pixel_std)
    if source is None and initial is not None and initial.pixels == taken:
        mean, std = pixel_statistics(initial)
        is_imagenet = initial.pixel_mean is None and initial.channels == 3
        source = "imagenet" if is_imagenet else NormaliseConfig(mean=mean, std=std)
    if source is None:
        source = "imagenet" if taken == RGB else "dataset"
    values = _dataset_values(dataset, model.channels) if source == "dataset" else source
    tree = config.model_dump()
    tree["data"]["normalise"] = source.model_dump() if isinstance(source, NormaliseConfig) else source
    tree["model"] |= {
        "pixel_dtype": taken.dtype,
        "pixel_bits": taken.bits,
        "pixel_mean": values.mean if isinstance(values, NormaliseConfig) else None,
        "pixel_std": values.std if isinstance(values, NormaliseConfig) else None,
    }
    return cast(ConfigT, parse_config(type(config), tree, dataset.store.url))


def images_taken(model: EncoderConfig, pixels: Pixels) -> Pixels:
    """Return what a decoder makes of a dataset's images for a model: they get its number of channels."""
    return pixels.model_copy(update={"channels": model.channels})


def check_channels(model: EncoderConfig, dataset: Dataset) -> None:
    """Raise UserError if a model cannot take the number of channels of a dataset's images."""
    found, wanted = dataset.manifest.pixels.channels, model.channels
    if found != wanted and not {found, wanted} <= {1, 3}:
        raise UserError(
            f"{dataset.store.url} has images with {plural(found, 'channel')}, but model.channels is {wanted}: set "
            f"model.channels={found}"
        )


def check_pixels(model: EncoderConfig, dataset: Dataset) -> None:
    """Raise UserError if a trained model cannot take a dataset's images: their number of channels or their type."""
    found, wanted = dataset.manifest.pixels, model.pixels
    if found.channels != wanted.channels and not {found.channels, wanted.channels} <= {1, 3}:
        raise UserError(
            f"{dataset.store.url} has images with {plural(found.channels, 'channel')}, but the model takes "
            f"{plural(wanted.channels, 'channel')}: use a dataset with as many"
        )
    if found.dtype != wanted.dtype:
        raise UserError(
            f"{dataset.store.url} has pixels of type {found.dtype}, but the model was trained on {wanted.dtype}: use a dataset "
            "of that type"
        )
    if found.dtype == "uint16" and found.bits != wanted.bits:
        raise UserError(
            f"{dataset.store.url} has {found.bits}-bit pixels, but the model was trained on {wanted.bits} bits, so their values "
            "mean something else: index or build the dataset with the same --bits"
        )


def _dataset_values(dataset: Dataset, channels: int) -> NormaliseConfig:
    """Return the dataset's statistics for a model with so many channels. UserError if they are missing."""
    try:
        found = read_statistics(dataset)
    except UserError as error:
        choices = "imagenet or {mean: […], std: […]}" if channels == 3 else "{mean: […], std: […]}"
        raise UserError(f"{error}, or set data.normalise={choices}") from None
    mean, std = found.mean, found.std
    if channels == 1 and len(mean) == 3:
        assert found.grey is not None
        mean, std = (found.grey[0],), (found.grey[1],)
    elif channels == 3 and len(mean) == 1:
        mean, std = mean * 3, std * 3
    if not all(std):
        constant = 1 + std.index(0)
        raise UserError(
            f"channel {constant} of {dataset.store.url} has the same value in all pixels, so it cannot be normalised by its "
            "standard deviation: set data.normalise={mean: […], std: […]}"
        )
    return NormaliseConfig(mean=mean, std=std)


def describe_normalisation(model: EncoderConfig) -> str:
    """Return one line on how a model normalises pixels."""
    mean, std = pixel_statistics(model)
    deep = f"{model.pixel_bits}-bit pixels / 65535"
    what = {"uint8": "8-bit pixels / 255", "uint16": deep, "float32": "pixels"}
    if model.pixel_mean is None and model.channels == 3:
        name = "ImageNet's "
    elif model.pixel_mean is None:
        return f"normalise: {what[model.pixel_dtype]}, without mean and standard deviation"
    else:
        name = ""
    return f"normalise: {what[model.pixel_dtype]} by {name}mean {format_values(mean)} and standard deviation {format_values(std)}"
