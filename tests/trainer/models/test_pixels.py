"""How a run normalises pixels: decided at its first start, and the same from then on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.statistics import STATISTICS, Statistics, read_statistics, write_statistics
from pipeline.errors import UserError
from pipeline.images.pixels import Pixels
from pipeline.storage.store import Store, open_store
from tests.support.training.small_runs import SMALL, config_of
from trainer.config.model_schema import EncoderConfig
from trainer.config.recipe import differences, fixed_values, load_config, parse_config
from trainer.config.schema import FinetuneConfig, NormaliseConfig, PretrainConfig
from trainer.models.pixels import check_pixels, describe_normalisation, resolve_pixels
from trainer.run.run import create_run, open_run
from trainer.run.snapshot import config_digest


@dataclass
class Manifest:
    pixels: Pixels


@dataclass
class Images:
    """Stands for a dataset of images of any kind."""

    manifest: Manifest
    store: Store
    fingerprint: str = "f1"


def images(folder: Path, channels: int = 3, dtype: Any = "uint8", **pixels: Any) -> Any:
    return Images(Manifest(Pixels(channels=channels, dtype=dtype, **pixels)), open_store(str(folder)))


def add_statistics(dataset: Any, mean: tuple[float, ...], std: tuple[float, ...], **changes: Any) -> None:
    values: dict[str, Any] = {"fingerprint": dataset.fingerprint, "dtype": dataset.manifest.pixels.dtype}
    values |= {
        "grey": (0.25, 0.5) if len(mean) == 3 else None,
        "images": 9,
        "pixels": 99,
        "samples": None,
        "seed": None,
    }
    write_statistics(dataset, Statistics(mean=mean, std=std, **{**values, **changes}))


def config(channels: int = 3, **data: Any) -> PretrainConfig:
    return config_of(model={**SMALL["model"], "channels": channels}, data={**SMALL["data"], **data})


def test_8_bit_rgb_is_normalised_as_ever_and_its_config_has_the_digest_of_earlier_versions(
    tmp_path: Path,
) -> None:
    fixed = resolve_pixels(config(), images(tmp_path))
    assert fixed.data.normalise == "imagenet"
    assert (fixed.model.pixel_mean, fixed.model.pixel_std) == (None, None)
    assert config_digest(fixed) == config_digest(config())
    later = ("channels", "pixel", "normalise")
    assert not [key for key in fixed_values(fixed) if any(name in key for name in later)]
    assert differences(config(), fixed) == []
    assert describe_normalisation(fixed.model) == (
        "normalise: 8-bit pixels / 255 by ImageNet's mean 0.485 0.456 0.406 and standard deviation 0.229 0.224 0.225"
    )


def test_the_digest_is_the_one_that_earlier_versions_computed() -> None:
    """Of a config that was written before there were channels."""
    assert config_digest(load_config(PretrainConfig, "recipes/pretrain_vit_base.yaml")) == OLD_DIGEST


OLD_DIGEST = "caca6c5658febca72ffa1b99e912fd7edaf12af37a9b7a3ce5df90484b0aa3c5"


@pytest.mark.parametrize(("channels", "dtype"), [(12, "uint16"), (3, "uint16"), (1, "uint8"), (5, "float32")])
def test_other_images_need_statistics_and_the_message_says_how(
    channels: int, dtype: str, tmp_path: Path
) -> None:
    dataset = images(tmp_path, channels, dtype)
    others = "imagenet or " if channels == 3 else ""
    with pytest.raises(
        UserError,
        match=f"run `maestream shards statistics {tmp_path}`, or set data.normalise={others}{{mean: ",
    ):
        resolve_pixels(config(channels), dataset)
    mean, std = tuple(0.1 * k for k in range(channels)), (0.5,) * channels
    add_statistics(dataset, mean, std)
    fixed = resolve_pixels(config(channels), dataset)
    assert fixed.data.normalise == "dataset"
    assert (fixed.model.pixel_mean, fixed.model.pixel_std, fixed.model.pixel_dtype) == (mean, std, dtype)
    own = {"mean": [1.0] * channels, "std": [2.0] * channels}
    assert resolve_pixels(config(channels, normalise=own), dataset).model.pixel_mean == (1.0,) * channels


def test_statistics_of_another_dataset_are_not_used(tmp_path: Path) -> None:
    dataset = images(tmp_path, 12, "uint16")
    add_statistics(dataset, (0.5,) * 12, (0.5,) * 12, fingerprint="f0")
    with pytest.raises(UserError, match="is of another dataset"):
        resolve_pixels(config(12), dataset)
    (tmp_path / STATISTICS).write_text('{"mean": 3}')
    with pytest.raises(UserError, match="is damaged: run"):
        read_statistics(dataset)


def test_grey_and_rgb_are_converted(tmp_path: Path) -> None:
    rgb = images(tmp_path / "rgb")
    add_statistics(rgb, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    fixed = resolve_pixels(config(1), rgb)
    assert (fixed.model.pixel_mean, fixed.model.pixel_std) == ((0.25,), (0.5,))
    grey = images(tmp_path / "grey", 1)
    assert resolve_pixels(config(3), grey).data.normalise == "imagenet"
    add_statistics(grey, (0.1,), (0.2,))
    assert resolve_pixels(config(3, normalise="dataset"), grey).model.pixel_std == (0.2,) * 3


def test_a_constant_channel_is_refused_by_its_number(tmp_path: Path) -> None:
    dataset = images(tmp_path, 2, "uint16")
    add_statistics(dataset, (0.1, 0.2), (0.5, 0.0))
    with pytest.raises(UserError, match=r"channel 2 of .* has the same value in all pixels"):
        resolve_pixels(config(2), dataset)


def test_other_channels_are_refused_with_the_key_to_set(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has images with 12 channels, but model\.channels is 3: set model\.channels=12"
    ):
        resolve_pixels(config(), images(tmp_path, 12, "uint16"))
    model = EncoderConfig(channels=12, pixel_dtype="uint16", pixel_bits=12)
    check_pixels(model, images(tmp_path, 12, "uint16", bits=12))
    with pytest.raises(UserError, match="the model takes 12 channels"):
        check_pixels(model, images(tmp_path))
    with pytest.raises(UserError, match="pixels of type uint8, but the model was trained on uint16"):
        check_pixels(model, images(tmp_path, 12))
    with pytest.raises(UserError, match="16-bit pixels, but the model was trained on 12 bits"):
        check_pixels(model, images(tmp_path, 12, "uint16"))


def test_the_default_is_the_normalisation_of_the_initial_weights(tmp_path: Path) -> None:
    own = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.2, 0.2)}
    initial = EncoderConfig(**own)
    fixed = resolve_pixels(config(), images(tmp_path), initial)
    assert fixed.data.normalise == NormaliseConfig(mean=own["pixel_mean"], std=own["pixel_std"])
    assert fixed.model.pixel_mean == own["pixel_mean"]
    assert resolve_pixels(config(normalise="imagenet"), images(tmp_path), initial).model.pixel_mean is None
    # other channels have nothing to do with it
    assert resolve_pixels(config(), images(tmp_path), EncoderConfig(channels=1)).data.normalise == "imagenet"


@pytest.mark.parametrize("normalise", [None, "dataset"])
def test_a_run_keeps_its_values_without_the_statistics(
    normalise: str | None, scenes: Dataset, tmp_path: Path
) -> None:
    own = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2]}
    first, run = open_run(str(tmp_path / "run"), config(normalise=own), scenes)
    first = resolve_pixels(first, scenes)
    stored = first.model_copy(update={"data": first.data.model_copy(update={"normalise": "dataset"})})
    create_run(stored, run, scenes)
    again, run = open_run(str(tmp_path / "run"), config(normalise=normalise), scenes)
    assert again.model == first.model
    assert again.data.normalise == "dataset"
    with pytest.raises(UserError, match=r"data\.normalise: dataset → imagenet"):
        open_run(str(tmp_path / "run"), config(normalise="imagenet"), scenes)


def test_a_runs_config_is_a_recipe(tmp_path: Path) -> None:
    dataset = images(tmp_path, 12, "uint16")
    add_statistics(dataset, (0.1,) * 12, (0.3,) * 12)
    fixed = resolve_pixels(config(12), dataset)
    again = parse_config(PretrainConfig, yaml.safe_load(yaml.safe_dump(fixed.model_dump())), "run")
    assert again == fixed
    assert resolve_pixels(again, dataset) == fixed


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"jitter": 0.4},
            "colour jitter needs 8-bit RGB images, but the model's have 12 channels .*: set jitter=0",
        ),
        ({"data": {"normalise": "imagenet"}}, "data.normalise=imagenet has values for 3 channels"),
        (
            {"data": {"normalise": {"mean": [1, 2], "std": [1, 1]}}},
            r"data\.normalise\.mean has 2 values, but model\.channels",
        ),
        ({"data": {"normalise": "mean"}}, r"expected dataset, imagenet or \{mean"),
        (
            {"data": {"normalise": {"mean": [0.5] * 12, "std": [0] * 12}}},
            r"normalise\.std\.0: expected a number greater than 0",
        ),
    ],
)
def test_impossible_settings_are_refused_when_the_config_is_read(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_config(PretrainConfig, {"model": {"channels": 12}, **tree}, "test")
    assert "\n" not in str(caught.value)


def test_randaugment_needs_8_bit_rgb(tmp_path: Path) -> None:
    tree = {"init": "scratch", "model": {"channels": 12}}
    with pytest.raises(UserError, match=r"RandAugment .* needs 8-bit RGB images.*: set mixing\.magnitude=0"):
        parse_config(FinetuneConfig, tree, "test")
    assert parse_config(FinetuneConfig, {**tree, "mixing": {"magnitude": 0}}, "test").model.channels == 12
    dataset = images(tmp_path, 3, "uint16")
    add_statistics(dataset, (0.1,) * 3, (0.3,) * 3)
    with pytest.raises(UserError, match="the model's have 3 channels of type uint16"):
        resolve_pixels(parse_config(FinetuneConfig, {"init": "scratch"}, "test"), dataset)
