"""Reconstruction: pictures have the visible patches of the original, and the error equals the loss."""

import io

import pytest
import torch
from PIL import Image

from pipeline.dataset.dataset import Dataset
from pipeline.decode.factory import make_decoder
from trainer.config.model_schema import ModelConfig
from trainer.evaluate.reconstruct import GREY, MASK_EPOCH, draw_grid, load_evenly_spaced, reconstruct
from trainer.models.mae import MAE
from trainer.models.masking import random_noise


@pytest.fixture(params=[False, True], ids=["pixels", "normalised"])
def model(request: pytest.FixtureRequest) -> MAE:
    torch.manual_seed(0)
    return MAE(
        ModelConfig(image_size=32, patch_size=8, width=24, depth=1, heads=3,
                    decoder_width=16, decoder_depth=1, decoder_heads=2, norm_pix=request.param)
    )  # fmt: skip


def test_visible_patches_are_the_original_and_the_error_is_the_loss(model: MAE, scenes: Dataset) -> None:
    batch = load_evenly_spaced(scenes, make_decoder("cpu", 32, 2), 9)
    result = reconstruct(model, batch.images, batch.sample_ids, seed=3)
    noise = random_noise(3, MASK_EPOCH, batch.sample_ids, model.num_patches)
    assert result.error == pytest.approx(model(batch.images, noise).mean().item(), rel=1e-5)
    _, masked = model.predict(batch.images, noise)
    where = model.unpatchify(masked[..., None].expand(-1, -1, 192).float()).bool()
    for picture in (result.masked, result.pasted):
        assert (picture[~where] == batch.images[~where]).all()
    assert (result.masked[where] == GREY).all()
    assert (result.pasted[where] != batch.images[where]).any()


def test_a_perfect_prediction_has_no_error_and_restores_the_image(
    model: MAE, scenes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = load_evenly_spaced(scenes, make_decoder("cpu", 32, 2), 5)
    predict = model.predict

    def perfect(images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model.target(model.patchify(images)), predict(images, noise)[1]

    monkeypatch.setattr(model, "predict", perfect)
    result = reconstruct(model, batch.images, batch.sample_ids, seed=0)
    assert result.error == pytest.approx(0, abs=1e-9)
    assert result.baseline > 0.02
    assert (result.pasted.int() - batch.images.int()).abs().max() <= 1


def test_the_grid_shows_three_pictures_per_image(model: MAE, scenes: Dataset) -> None:
    batch = load_evenly_spaced(scenes, make_decoder("cpu", 32, 2), 5)
    with Image.open(io.BytesIO(draw_grid(reconstruct(model, batch.images, batch.sample_ids, 0)))) as grid:
        assert grid.width > 6 * 160
        assert grid.height > 3 * 160
