"""Weights and channels: the first layer adapts to another number, and exports keep channels and normalisation."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.training.published_mae import small
from trainer.config.model_schema import ClassifierConfig, EncoderConfig, ModelConfig
from trainer.config.schema import InitConfig
from trainer.models.classifier import Classifier, Encoder
from trainer.models.mae import MAE
from trainer.weights.api import load_classifier, load_encoder
from trainer.weights.channels import adapt_channels
from trainer.weights.export import export
from trainer.weights.init import init_encoder, init_mae
from trainer.weights.pretrained import ModelInfo, PretrainedModel, read_initial_model, read_pretrained
from trainer.weights.state_dicts import build_model

SHAPE = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 1, "heads": 3}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
BANDS = {
    "channels": 12,
    "pixel_dtype": "uint16",
    "pixel_bits": 12,
    "pixel_mean": tuple(np.linspace(0.05, 0.3, 12).tolist()),
    "pixel_std": tuple(np.linspace(0.01, 0.07, 12).tolist()),
}


def of(model: EncoderConfig) -> PretrainedModel:
    torch.manual_seed(0)
    names = ["a", "b", "c"] if isinstance(model, ClassifierConfig) else None
    return PretrainedModel(ModelInfo("test", model, classes=names), build_model(model, 3).state_dict())


def test_the_first_layer_is_adapted_by_timms_rule() -> None:
    weight = torch.randn(4, 3, 2, 2)
    grey = adapt_channels(weight, 1)
    assert torch.equal(grey, weight[:, :1] + weight[:, 1:2] + weight[:, 2:])
    four = adapt_channels(weight, 4)
    torch.testing.assert_close(four, torch.cat([weight, weight[:, :1]], dim=1) * 3 / 4)
    # a grey image gives the same outputs with any number of equal channels
    image = torch.randn(1, 1, 2, 2)
    for channels in (1, 6, 12):
        adapted = adapt_channels(weight, channels)
        assert adapted is not None
        out = torch.nn.functional.conv2d(image.expand(-1, channels, -1, -1), adapted)
        torch.testing.assert_close(out, torch.nn.functional.conv2d(image.expand(-1, 3, -1, -1), weight))
    assert adapt_channels(torch.randn(4, 5, 2, 2), 7) is None
    assert adapt_channels(weight.half(), 7).dtype == torch.float16


def test_a_run_starts_from_rgb_weights_and_says_so(tmp_path: Path) -> None:
    torch.save({"model": small("visualize")}, tmp_path / "mae.pth")
    init = InitConfig(run=str(tmp_path / "mae.pth"))
    shape = {**SHAPE, "depth": 2}
    torch.manual_seed(1)
    encoder = Encoder(EncoderConfig(**shape, channels=5))
    assert init_encoder(init, encoder, "norm") == [
        "init: the first layer is adapted from 3 to 5 channels: its weights are repeated and scaled by 3/5 (timm's rule)"
    ]
    published = small("visualize")
    torch.testing.assert_close(
        encoder.patch_embed.proj.weight, published["patch_embed.proj.weight"][:, [0, 1, 2, 0, 1]] * 0.6
    )
    assert torch.equal(encoder.blocks[0].norm1.bias, published["blocks.0.norm1.bias"])
    mae = MAE(ModelConfig(**shape, **DECODER, channels=5))
    before = mae.decoder_pred.weight.clone()
    _, second = init_mae(init, mae)
    assert "prediction layer starts from random weights" in second
    assert torch.equal(mae.decoder_pred.weight, before)
    assert torch.equal(mae.decoder_embed.weight, published["decoder_embed.weight"])
    rgb = MAE(ModelConfig(**shape, **DECODER))
    assert init_mae(init, rgb) == []
    assert torch.equal(rgb.decoder_pred.weight, published["decoder_pred.weight"])


def test_weights_that_cannot_be_adapted_are_refused_by_name(tmp_path: Path) -> None:
    export(of(EncoderConfig(**SHAPE, **BANDS)), "safetensors", open_store(str(tmp_path / "bands")))
    init = InitConfig(run=str(tmp_path / "bands"))
    with pytest.raises(UserError, match=r"it has 12 channels, not 3 .*model\.channels=12"):
        init_encoder(init, Encoder(EncoderConfig(**SHAPE)), "norm")
    grey = Encoder(EncoderConfig(**SHAPE, channels=1))
    assert "the weights of its channels are added" in init_encoder(init, grey, "norm")[0]


def test_another_normalisation_than_the_weights_is_mentioned(tmp_path: Path) -> None:
    export(of(EncoderConfig(**SHAPE, **BANDS)), "safetensors", open_store(str(tmp_path / "bands")))
    init = InitConfig(run=str(tmp_path / "bands"))
    assert read_initial_model(init.run, None) == EncoderConfig(**SHAPE, **BANDS)
    assert init_encoder(init, Encoder(EncoderConfig(**SHAPE, **BANDS)), "norm") == []
    other = EncoderConfig(**SHAPE, **{**BANDS, "pixel_mean": (0.5,) * 12})
    (line,) = init_encoder(init, Encoder(other), "norm")
    assert "trained with another normalisation" in line
    assert f"data.normalise={{mean: {json.dumps(list(BANDS['pixel_mean']))}, std: " in line


@pytest.mark.parametrize("form", ["safetensors", "transformers", "timm", "authors"])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(ModelConfig(**SHAPE, **DECODER, **BANDS), id="mae"),
        pytest.param(EncoderConfig(**SHAPE, **BANDS), id="encoder"),
        pytest.param(ClassifierConfig(**SHAPE, **BANDS, pool="class"), id="classifier"),
        pytest.param(EncoderConfig(**SHAPE, channels=1, pixel_mean=(0.4,), pixel_std=(0.2,)), id="grey"),
        pytest.param(EncoderConfig(**SHAPE, pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.2, 0.2, 0.3)), id="RGB"),
    ],
)
def test_exports_keep_channels_and_normalisation(model: EncoderConfig, form: str, tmp_path: Path) -> None:
    found, out = of(model), str(tmp_path / "out")
    if form == "authors" and isinstance(model, ModelConfig):
        with pytest.raises(UserError, match="supports 3 channels only, not 12"):
            export(found, form, open_store(out))
        assert not Path(out).exists()
        return
    export(found, form, open_store(out))
    back = read_pretrained(out + ("/model.pth" if form == "authors" else ""))
    pixels = ("channels", "pixel_dtype", "pixel_bits", "pixel_mean", "pixel_std")
    assert [getattr(back.model, name) for name in pixels] == [getattr(model, name) for name in pixels]
    assert all(torch.equal(back.weights[name], found.weights[name]) for name in back.weights)
    card = (tmp_path / "out/README.md").read_text()
    assert f"[n, {model.channels}, 32, 32]" in card
    if form in ("transformers", "timm", "authors"):
        assert str(model.pixel_mean) in card


def test_timm_does_not_adapt_a_first_layer_of_other_channels(tmp_path: Path) -> None:
    export(of(EncoderConfig(**SHAPE, **BANDS)), "timm", open_store(str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["in_chans"] == 12
    assert config["pretrained_cfg"]["input_size"] == [12, 32, 32]
    assert config["pretrained_cfg"]["first_conv"] is None


def test_transformers_computes_the_same_tokens_of_12_bands(tmp_path: Path) -> None:
    found = of(EncoderConfig(**SHAPE, **BANDS))
    export(found, "transformers", open_store(str(tmp_path)))
    theirs = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    ours = Encoder(found.model)
    ours.load_state_dict(found.weights)
    images = torch.randint(0, 4096, (2, 12, 32, 32)).to(torch.uint16)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (images.float() * settings["rescale_factor"] - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels).last_hidden_state, ours(images), rtol=1e-4, atol=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_exported_programs_take_the_datasets_pixels(dtype: str, tmp_path: Path) -> None:
    model = ClassifierConfig(**SHAPE, **{**BANDS, "pixel_dtype": dtype}, pool="class")
    found = of(model)
    ours = Classifier(model, 3)
    ours.load_state_dict(found.weights)
    images = torch.randint(0, 60000, (2, 12, 32, 32)).to(getattr(torch, dtype))
    with torch.no_grad():
        expected = ours.eval()(images)
    for form in ("onnx", "torch-export"):
        export(found, form, open_store(str(tmp_path / form)))
    program = torch.export.load(tmp_path / "torch-export/model.pt2").module()
    torch.testing.assert_close(program(images), expected, rtol=1e-5, atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    (output,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_the_api_takes_the_datasets_pixels_and_refuses_others(tmp_path: Path) -> None:
    export(of(EncoderConfig(**SHAPE, **BANDS)), "safetensors", open_store(str(tmp_path / "encoder")))
    encoder = load_encoder(str(tmp_path / "encoder"))
    assert encoder(torch.zeros(2, 12, 32, 32, dtype=torch.uint16)).shape == (2, 17, 24)
    for wrong in (
        torch.zeros(2, 3, 32, 32, dtype=torch.uint16),
        torch.zeros(2, 12, 32, 32, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"images must be uint16\[n, 12, 32, 32\]; got"):
            encoder(wrong)
    floats = ClassifierConfig(**SHAPE, **{**BANDS, "pixel_dtype": "float32"})
    export(of(floats), "safetensors", open_store(str(tmp_path / "floats")))
    classifier = load_classifier(str(tmp_path / "floats"))
    assert classifier(torch.zeros(2, 12, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"images must be float32\[n, 12, 32, 32\]; got float64"):
        classifier(torch.zeros(2, 12, 32, 32, dtype=torch.float64))
