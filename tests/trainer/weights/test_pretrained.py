"""Reading weights: published files are recognised by their parameter names."""

import argparse
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from tests.support.training.published_mae import (
    HINTS,
    SIZES,
    decoded,
    encoded,
    normed,
    random_weights,
    shapes,
    small,
)
from trainer.config.model_schema import ClassifierConfig, EncoderConfig, ModelConfig
from trainer.config.schema import InitConfig
from trainer.models.classifier import Classifier, Encoder
from trainer.models.mae import MAE
from trainer.models.vit import sincos_pos_embed
from trainer.weights.api import load_encoder
from trainer.weights.init import init_encoder, init_mae
from trainer.weights.pretrained import ModelInfo, config_json, read_pretrained
from trainer.weights.resize import interpolate_pos_embed, resize_model

KINDS: dict[str, type[EncoderConfig]] = {
    "pretrain": EncoderConfig,
    "visualize": ModelConfig,
    "finetuned": ClassifierConfig,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_published_files_are_recognised_by_their_keys(kind: str, size: str, tmp_path: Path) -> None:
    """With all names and shapes of the published files. Each tensor is one number, expanded."""
    width, depth, heads, patch = SIZES[size]
    table = shapes(kind, width, depth, patch)
    torch.save(
        {"model": {name: torch.ones(1).expand(shape) for name, shape in table.items()}}, tmp_path / "x"
    )
    found = read_pretrained(str(tmp_path / "x"))
    assert type(found.model) is KINDS[kind]
    expected = {"image_size": 224, "patch_size": patch, "width": width, "depth": depth, "heads": heads}
    if kind == "visualize":
        expected |= {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16, "norm_pix": False}
    if kind == "finetuned":
        expected |= {"pool": "mean"}
    assert found.model == KINDS[kind](**expected)
    assert found.weights.keys() == table.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_imported_weights_give_the_published_models_outputs(kind: str, size: str, tmp_path: Path) -> None:
    """With the published width, heads and patch size, but one block and four patches."""
    width, _, heads, patch = SIZES[size]
    weights = random_weights(shapes(kind, width, 1, patch, 2 * patch, d_depth=1))
    torch.save({"model": weights}, tmp_path / "weights.pth")
    found = read_pretrained(str(tmp_path / "weights.pth"))
    images = torch.randn(2, 3, 2 * patch, 2 * patch)
    tokens = encoded(weights, images, heads)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    if kind == "finetuned":
        model = Classifier(found.model, 1000).eval()
        model.load_state_dict(found.weights)
        features = normed(weights, "fc_norm", tokens[:, 1:].mean(dim=1))
        close(model.features(images), features)
        close(model(images), features @ weights["head.weight"].T + weights["head.bias"])
        return
    pixels = torch.randint(0, 256, (2, 3, 2 * patch, 2 * patch), dtype=torch.uint8)
    encoder = load_encoder(str(tmp_path / "weights.pth"))
    latent = normed(weights, "norm", encoded(weights, encoder.normalise(pixels), heads))
    close(encoder(pixels), latent)
    if kind == "visualize":
        mae = MAE(found.model)
        mae.num_visible = 4
        mae.load_state_dict(found.weights)
        in_order = torch.arange(4.0).expand(2, 4)
        close(mae.predict(encoder.normalise(pixels), in_order)[0], decoded(weights, latent, 16))


def test_a_training_checkpoint_records_its_target(tmp_path: Path) -> None:
    args = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.5, model="mae_vit_large_patch16")
    torch.save(
        {"model": small(), "optimizer": {"state": {}}, "epoch": 3, "args": args},
        tmp_path / "checkpoint-3.pth",
    )
    model = read_pretrained(str(tmp_path / "checkpoint-3.pth"), hints=HINTS).model
    assert isinstance(model, ModelConfig)
    assert (model.norm_pix, model.mask_ratio) == (True, 0.5)


def test_unknown_heads_are_refused_unless_given(tmp_path: Path) -> None:
    save_file(small("pretrain"), tmp_path / "w")
    with pytest.raises(UserError, match=r"no published model has width 24.*--heads N"):
        read_pretrained(str(tmp_path / "w"))
    assert read_pretrained(str(tmp_path / "w"), hints=HINTS).model.heads == 3


# ---- other image sizes and patch sizes


def test_position_embeddings_are_interpolated_for_another_image_size(tmp_path: Path) -> None:
    weights = small()
    weights["pos_embed"] = sincos_pos_embed(24, (4, 4))
    save_file(weights, tmp_path / "w")
    found = read_pretrained(str(tmp_path / "w"), hints=HINTS)
    larger = resize_model(found, (48, 64))
    assert larger.model.grid == (6, 8)
    assert torch.equal(
        larger.weights["pos_embed"], interpolate_pos_embed(weights["pos_embed"], (4, 4), (6, 8))
    )
    assert larger.weights["decoder_pos_embed"].shape == (1, 49, 16)
    mae = MAE(larger.model)
    mae.load_state_dict(larger.weights)
    assert mae(torch.zeros(1, 3, 48, 64, dtype=torch.uint8), torch.rand(1, 48)).isfinite()
    # the corner of the new grid is still most similar to the corner of the old one
    similarity = larger.weights["pos_embed"][0, 1:] @ weights["pos_embed"][0, 1]
    assert int(similarity.argmax()) == 0
    with pytest.raises(UserError, match=r"--image-size: .*not divisible by patch_size 8"):
        resize_model(found, (48, 60))


def test_another_patch_size_is_refused(tmp_path: Path) -> None:
    save_file(small("pretrain"), tmp_path / "w")
    encoder = Encoder(EncoderConfig(image_size=32, patch_size=16, width=24, depth=2, heads=3))
    with pytest.raises(
        UserError, match="its patch size is 8, not 16 \\(position embeddings can be interpolated"
    ):
        init_encoder(InitConfig(run=str(tmp_path / "w")), encoder, "norm")


def test_models_are_initialised_from_files(tmp_path: Path) -> None:
    weights = small()
    save_file(weights, tmp_path / "w")
    init = InitConfig(run=str(tmp_path / "w"))
    shape = {"image_size": 48, "patch_size": 8, "width": 24, "depth": 2, "heads": 3}
    encoder = Encoder(EncoderConfig(**shape))
    init_encoder(init, encoder, "norm")
    assert torch.equal(encoder.blocks[1].mlp.fc2.weight, weights["blocks.1.mlp.fc2.weight"])
    assert torch.equal(encoder.pos_embed, interpolate_pos_embed(weights["pos_embed"], (4, 4), (6, 6)))
    mae = MAE(ModelConfig(**shape, decoder_width=16, decoder_depth=1, decoder_heads=2))
    init_mae(init, mae)
    assert torch.equal(mae.decoder_pred.bias, weights["decoder_pred.bias"])
    other = MAE(ModelConfig(**shape, decoder_width=32, decoder_depth=1, decoder_heads=2))
    with pytest.raises(
        UserError,
        match=r"decoder_.* has shape \[.*expected \[.* model.decoder_width=16 model.decoder_depth=1",
    ):
        init_mae(init, other)
    other_heads = Encoder(EncoderConfig(**{**shape, "heads": 6}))
    torch.save(
        {
            "model": weights,
            "maestream": config_json(ModelInfo("", mae.config.model_copy(update={"image_size": 32}))),
        },
        tmp_path / "with_config",
    )
    keys = "model.image_size=32 model.patch_size=8 model.width=24 model.depth=2 model.heads=3$"
    with pytest.raises(UserError, match=f"it has 3 heads, not 6.*: {keys}"):
        init_encoder(InitConfig(run=str(tmp_path / "with_config")), other_heads, "norm")
    # without a decoder in the file, the model's decoder keeps its weights
    save_file(small("pretrain"), tmp_path / "encoder")
    before = other.decoder_pred.weight.clone()
    init_mae(InitConfig(run=str(tmp_path / "encoder")), other)
    assert torch.equal(other.decoder_pred.weight, before)
    assert torch.equal(other.norm.bias, small("pretrain")["norm.bias"])
    save_file(small("finetuned"), tmp_path / "finetuned")
    with pytest.raises(UserError, match=r"norm\.bias is missing"):
        init_encoder(InitConfig(run=str(tmp_path / "finetuned")), encoder, "norm")
