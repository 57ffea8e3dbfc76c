"""Images with any number of channels: patches, normalisation and the loss are what their definitions say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.model_schema import ClassifierConfig, EncoderConfig, ModelConfig
from trainer.models.classifier import Classifier, Encoder
from trainer.models.mae import MAE
from trainer.models.vit import MEAN, STD
from trainer.train.benchmark import count_flops

SHAPE = {"image_size": 24, "patch_size": 8, "width": 24, "depth": 1, "heads": 3}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
TOP = {"uint8": 255, "uint16": 65535, "float32": 1}


def images_of(dtype: str, channels: int, n: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(0)
    shape = (n, channels, 24, 24)
    if dtype == "float32":
        return torch.from_numpy(rng.normal(200, 30, shape).astype(np.float32))
    return torch.from_numpy(rng.integers(0, TOP[dtype] + 1, shape).astype(dtype))


@settings(max_examples=20)
@given(
    channels=st.integers(1, 13), rows=st.integers(1, 4), columns=st.integers(1, 4), patch=st.integers(1, 6)
)
def test_patches_are_pixels_in_the_order_row_column_channel(
    channels: int, rows: int, columns: int, patch: int
) -> None:
    size = (rows * patch, columns * patch)
    model = Encoder(
        EncoderConfig(image_size=size, patch_size=patch, width=8, depth=1, heads=2, channels=channels)
    )
    images = torch.randn(2, channels, *size)
    patches = model.patchify(images)
    for number in range(rows * columns):
        y, x = number // columns * patch, number % columns * patch
        box = images[:, :, y : y + patch, x : x + patch]
        assert torch.equal(patches[:, number], box.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(model.unpatchify(patches), images)
    convolution = torch.nn.functional.conv2d(
        images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=patch
    )
    torch.testing.assert_close(
        model.patch_embed(patches), convolution.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", TOP)
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_pixels_are_scaled_by_their_type_and_normalised_by_channel(dtype: str, channels: int) -> None:
    mean, std = np.linspace(0.1, 0.9, channels), np.linspace(0.5, 2, channels)
    config = EncoderConfig(
        **SHAPE, channels=channels, pixel_dtype=dtype, pixel_mean=tuple(mean), pixel_std=tuple(std)
    )
    images = images_of(dtype, channels)
    expected = images.numpy().astype(np.float64) / TOP[dtype]
    expected = (expected - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(Encoder(config).double().normalise(images), expected, rtol=1e-6, atol=1e-6)


def test_rgb_is_normalised_by_the_same_numbers_as_ever() -> None:
    images = images_of("uint8", 3)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    assert torch.equal(Encoder(EncoderConfig(**SHAPE)).normalise(images), (images.float() / 255 - mean) / std)


@pytest.mark.parametrize("dtype", TOP)
def test_models_take_pixels_of_their_type_and_normalised_floats(dtype: str) -> None:
    torch.manual_seed(0)
    values = {"pixel_mean": (0.5,) * 5, "pixel_std": (0.25,) * 5}
    if dtype == "float32":
        values = {"pixel_mean": (200.0,) * 5, "pixel_std": (30.0,) * 5}
    images, noise = images_of(dtype, 5), torch.rand(3, 9)
    mae = MAE(ModelConfig(**SHAPE, **DECODER, channels=5, pixel_dtype=dtype, **values))
    if dtype != "float32":
        assert torch.equal(mae(images, noise), mae(mae.normalise(images), noise))
    classifier = Classifier(ClassifierConfig(**SHAPE, channels=5, pixel_dtype=dtype, **values), 4)
    normalised = classifier.normalise(images)
    assert normalised.abs().max() < 10
    assert torch.equal(classifier(images), classifier(normalised, None, True))


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_loss_is_the_mean_squared_error_over_masked_patches_of_all_channels(norm_pix: bool) -> None:
    torch.manual_seed(0)
    model = MAE(
        ModelConfig(**SHAPE, **DECODER, channels=12, pixel_dtype="uint16", norm_pix=norm_pix)
    ).double()
    images, noise = images_of("uint16", 12), torch.rand(3, 9)
    assert model.decoder_pred.out_features == 8 * 8 * 12
    prediction, masked = model.predict(images, noise)
    target = model.patchify(model.normalise(images))
    if norm_pix:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    expected = torch.stack(
        [(p - t)[m].square().mean() for p, t, m in zip(prediction, target, masked, strict=True)]
    )
    torch.testing.assert_close(model(images, noise), expected)


def test_a_model_of_more_channels_needs_more_operations() -> None:
    few, many = (ModelConfig(**SHAPE, **DECODER, channels=channels) for channels in (3, 12))
    patches, visible, pixels = 9, few.num_visible, 8 * 8
    # Forward and the gradient of the weights; the decoder's prediction also needs the gradient of its input.
    added = 2 * 9 * pixels * (2 * visible * 24 + 3 * (patches - visible) * 16)
    assert count_flops(many) - count_flops(few) == added
