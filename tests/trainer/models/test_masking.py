"""Masks are a pure function of (seed, epoch, sample id), the same hash on host and device."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.hashing import hash64
from trainer.config.model_schema import ModelConfig
from trainer.models.mae import MAE
from trainer.models.masking import MASK_STREAM, masking_noise, random_noise


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_the_hash_is_numpys(seed: int, epoch: int, ids: list[int]) -> None:
    noise = random_noise(seed, epoch, torch.tensor(ids), 49)
    expected = hash64(seed, MASK_STREAM, epoch, np.array(ids)[:, None], np.arange(49)[None, :])
    assert (noise.numpy().view(np.uint64) == expected).all()


def test_a_sample_is_masked_alike_in_any_company() -> None:
    ids = torch.tensor([5, 1, 9])
    together = random_noise(0, 3, ids, 196)
    for i in range(3):
        assert (random_noise(0, 3, ids[i : i + 1], 196)[0] == together[i]).all()
    assert (random_noise(0, 4, ids, 196) != together).all()


def test_three_quarters_are_masked_each_patch_as_often() -> None:
    model = MAE(ModelConfig(width=48, depth=1, heads=3, decoder_width=16, decoder_depth=1, decoder_heads=1))
    masking = model.select_patches(random_noise(0, 0, torch.arange(4000), model.num_patches))
    assert masking.visible.shape == (4000, 49)
    counts = torch.bincount(masking.visible.flatten(), minlength=196) / 4000
    assert counts.min() > 0.22
    assert counts.max() < 0.28


def test_what_is_masked_is_never_seen() -> None:
    """Changing masked pixels changes nothing that the model predicts."""
    torch.manual_seed(0)
    model = MAE(
        ModelConfig(image_size=32, patch_size=8, width=48, depth=2, heads=3,
                    decoder_width=16, decoder_depth=1, decoder_heads=1)
    )  # fmt: skip
    noise = random_noise(0, 0, torch.arange(2), model.num_patches)
    images = torch.randn(2, 3, 32, 32)
    prediction, masked = model.predict(images, noise)
    hidden = masked[..., None].expand(-1, -1, 8 * 8 * 3)
    other = torch.where(model.unpatchify(hidden.float()).bool(), torch.randn_like(images), images)
    assert (other != images).any()
    assert torch.equal(model.predict(other, noise)[0], prediction)
    assert torch.equal(model.unpatchify(model.patchify(images)), images)


def shape_of(**changes: Any) -> ModelConfig:
    return ModelConfig(image_size=56, patch_size=4, width=24, depth=1, heads=2, decoder_width=16, decoder_depth=1,
                       decoder_heads=2, **changes)  # fmt: skip


def masks(ids: torch.Tensor, **changes: Any) -> torch.Tensor:
    """bool[n, 14, 14]: which are masked."""
    config = shape_of(**changes)
    model = MAE(config)
    restore = model.select_patches(masking_noise(config, 0, 0, ids)).restore
    return (restore >= model.num_visible).unflatten(1, (14, 14))


def test_a_grid_keeps_one_of_each_four() -> None:
    hidden = masks(torch.arange(3), sampling="grid")
    kept = ~hidden.unflatten(1, (7, 2)).unflatten(3, (7, 2))  # [n, 7, 2, 7, 2]
    assert (kept.sum(dim=(2, 4)) == 1).all()


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_blocks_are_blocks_and_of_the_right_number(ratio: float) -> None:
    ids = torch.arange(50)
    hidden, random = masks(ids, sampling="block", mask_ratio=ratio), masks(ids, mask_ratio=ratio)
    assert (hidden.sum(dim=(1, 2)) == int(196 - int(196 * (1 - ratio)))).all()

    def borders(masked: torch.Tensor) -> torch.Tensor:
        return (masked[:, 1:] != masked[:, :-1]).float().mean() + (
            masked[..., 1:] != masked[..., :-1]
        ).float().mean()

    assert borders(hidden) < 0.5 * borders(random)
    assert (masks(ids[7:9], sampling="block", mask_ratio=ratio) == hidden[7:9]).all()


@pytest.mark.parametrize("masked", ["token", "noise"])
def test_other_encoders_see_what_they_may(masked: str) -> None:
    config = shape_of(masked=masked)
    model = MAE(config)
    images = torch.rand(2, 3, 56, 56)
    noise = masking_noise(config, 0, 0, torch.arange(2))
    model(images, noise).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    prediction, hidden = model.predict(images, noise)
    patches = model.patchify(images)
    other = model.unpatchify(torch.where(hidden[..., None], 1 - patches, patches))
    assert torch.equal(model.predict(other, noise)[0], prediction) == (masked == "token")
