"""Promise 7: it is the paper's model. The yardstick is transformers' ViTMAE, on shared weights and noise."""

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from tests.support.training import published_mae as authors
from trainer.config.model_schema import ModelConfig
from trainer.config.recipe import load_config
from trainer.config.schema import PretrainConfig
from trainer.models.mae import MAE
from trainer.models.vit import sincos_pos_embed
from trainer.weights.state_dicts import to_native, to_transformers, transformers_config

BASE = ModelConfig()
ODD = ModelConfig(
    image_size=120, patch_size=12, width=96, depth=3, heads=4,
    decoder_width=64, decoder_depth=2, decoder_heads=2, mask_ratio=0.6, norm_pix=False,
)  # fmt: skip


def reference(
    config: ModelConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> ViTMAEForPreTraining:
    theirs = ViTMAEConfig(**transformers_config(config))
    return ViTMAEForPreTraining.from_pretrained(
        None, config=theirs, state_dict=to_transformers(weights, config), dtype=dtype
    ).train()


@pytest.mark.parametrize(
    ("config", "dtype", "tolerance"),
    [
        pytest.param(BASE, torch.float32, 1e-5, id="B/16 at 224"),
        pytest.param(BASE, torch.float64, 1e-9, id="B/16 at 224, exactly", marks=pytest.mark.soak),
        pytest.param(ODD, torch.float32, 1e-5, id="non-default"),
        pytest.param(ODD, torch.float64, 1e-9, id="non-default, exactly"),
    ],
)
def test_same_numbers_as_the_published_model(
    config: ModelConfig, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    ours = MAE(config).to(dtype)
    for parameter in ours.parameters():  # biases too are something
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    theirs = reference(config, ours.state_dict(), dtype)
    images = torch.randn(2, 3, config.image_size, config.image_size, dtype=dtype)
    noise = torch.rand(2, config.num_patches)

    expected = theirs(pixel_values=images, noise=noise)
    prediction, masked = ours.predict(images, noise)
    loss = ours(images, noise).mean()
    assert (masked == expected.mask.bool()).all()
    assert close(prediction, expected.logits, tolerance)
    assert close(loss, expected.loss, tolerance)
    if dtype == torch.float64:
        loss.backward()
        expected.loss.backward()
        gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        fused = to_native(
            gradients,
            "theirs",
        )  # the gradient of the key's bias alone is 0 but for noise
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                assert close(parameter.grad, fused[name], tolerance), name


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Relative to the largest number of the tensor."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize(("width", "grid"), [(768, 14), (64, 7), (1280, 16)])
def test_positions_are_the_authors(width: int, grid: int) -> None:
    rows_first = build_2d_sinusoidal_position_embedding(grid, grid, width, cls_token=True)
    half = width // 2  # the authors have the column in the first half
    assert torch.equal(
        sincos_pos_embed(width, (grid, grid))[0],
        torch.cat([rows_first[:, half:], rows_first[:, :half]], dim=1),
    )


@pytest.mark.parametrize("size", authors.SIZES)
def test_names_and_shapes_are_the_authors(size: str) -> None:
    width, depth, _, patch = authors.SIZES[size]
    config = load_config(PretrainConfig, f"recipes/pretrain_vit_{size}.yaml").model
    with torch.device("meta"):
        state = MAE(config).state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert found == authors.shapes("visualize", width, depth, patch)


def test_initialisation_is_the_papers() -> None:
    model = MAE(ODD)
    width = ODD.width
    bound = (6 / (width + 3 * 12 * 12)) ** 0.5  # xavier over the patch as one vector
    weight = model.patch_embed.proj.weight
    assert 0.95 * bound < weight.abs().max() <= bound
    assert abs(float(model.cls_token.detach().std()) - 0.02) < 0.008
    assert (model.blocks[0].attn.qkv.bias == 0).all()
    assert (model.norm.weight == 1).all()
