"""Erasing, mixup, CutMix and smoothing: shares, areas and targets, against independent formulas."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.errors import UserError
from trainer.augment.mixing import erase, erase_boxes, mix, mixing_partners, mixing_plan, smooth_targets
from trainer.config.recipe import parse_config
from trainer.config.schema import FinetuneConfig

IDS = np.arange(20_000)


def test_a_quarter_is_erased_and_boxes_are_of_the_right_area() -> None:
    boxes = erase_boxes(0.25, 0, 1, IDS, 224, 224)
    done = boxes[:, 2] > 0
    assert abs(done.mean() - 0.25) < 0.01
    y, x, h, w = boxes[done].T
    assert min(y.min(), x.min()) >= 0
    assert max((y + h).max(), (x + w).max()) <= 224
    share = h * w / 224**2
    assert share.min() > 0.018
    assert share.max() < 0.34
    # Uniform from 0.02 to 1/3, but for boxes that do not fit and are drawn again.
    assert abs(share.mean() - (0.02 + 1 / 3) / 2) < 0.02


def test_what_is_erased_is_noise_and_the_rest_stays() -> None:
    images = torch.full((64, 3, 32, 32), 7.0)
    ids = np.arange(1000, 1064)
    erased = erase(images, 0.5, 3, 2, ids)
    boxes = erase_boxes(0.5, 3, 2, ids, 32, 32)
    for image, (y, x, h, w) in zip(erased, boxes, strict=True):
        changed = (image != 7).any(dim=0)
        expected = torch.zeros(32, 32, dtype=torch.bool)
        expected[y : y + h, x : x + w] = True
        assert (changed == expected).all()
    noise = erased[erased != 7]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert (erase(images[5:9], 0.5, 3, 2, ids[5:9]) == erased[5:9]).all()  # whoever else is there


def test_shares_are_beta_distributed() -> None:
    kept, boxes = mixing_plan(0.8, 0.0, 0, 0, IDS, 224, 224)
    assert not boxes.any()
    assert stats.kstest(kept, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    kept, boxes = mixing_plan(0.8, 1.0, 0, 0, IDS, 224, 224)
    cut = boxes[:, 2] * boxes[:, 3] > 0
    assert abs(cut.mean() - 0.5) < 0.02


def test_a_cut_share_is_that_of_its_pixels() -> None:
    kept, boxes = mixing_plan(0.0, 1.0, 0, 0, IDS[:64], 32, 48)
    images = torch.zeros(64, 3, 32, 48)
    images[1::2] = 1
    whom = np.arange(64) ^ 1
    targets = smooth_targets(torch.arange(64) % 2, 2, 0.0)
    mixed, mixed_targets = mix(images, targets, whom, kept, boxes)
    own = torch.arange(64) % 2
    share = (mixed == own[:, None, None, None]).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(share.double(), torch.from_numpy(kept), atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed_targets.gather(1, own[:, None])[:, 0], share, atol=1e-6, rtol=0)


def test_mixup_is_a_mean_of_images_and_targets() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 4, 4, generator=rng)
    targets = smooth_targets(torch.arange(8), 10, 0.1)
    kept, boxes = mixing_plan(0.8, 0.0, 1, 1, IDS[:8], 4, 4)
    whom = mixing_partners(np.ones(8, np.float32), 4)
    mixed, mixed_targets = mix(images, targets, whom, kept, boxes)
    share = torch.from_numpy(kept).float()[:, None]
    torch.testing.assert_close(mixed_targets, share * targets + (1 - share) * targets[whom])
    torch.testing.assert_close(mixed[3], share[3] * images[3] + (1 - share[3]) * images[whom[3]])
    torch.testing.assert_close(mixed_targets.sum(dim=1), torch.ones(8))


def test_smoothing_is_szegedys() -> None:
    target = smooth_targets(torch.tensor([2]), 4, 0.1)
    torch.testing.assert_close(target, torch.tensor([[0.025, 0.025, 0.925, 0.025]]))


@given(lanes=st.integers(1, 6), per_lane=st.integers(1, 5), data=st.data())
def test_partners_are_of_the_same_lane_and_good(lanes: int, per_lane: int, data: st.DataObject) -> None:
    n = lanes * per_lane
    weights = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n)), np.float32)
    whom = mixing_partners(weights, per_lane)
    assert (whom // per_lane == np.arange(n) // per_lane).all()
    assert all(weights[other] > 0 or other == i for i, other in enumerate(whom))
    good = mixing_partners(np.ones(n, np.float32), per_lane)
    lane, place = np.divmod(np.arange(n), per_lane)
    assert (good == lane * per_lane + (place + 1) % per_lane).all()  # the next one


@pytest.mark.parametrize("changes", [{"global_batch": 8, "data": {"lanes": 8}}, {"global_batch": 9}])
def test_without_partners_it_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"same lane.*fewer lanes"):
        parse_config(FinetuneConfig, {"init": "scratch", **changes}, "recipe.yaml")
    parse_config(
        FinetuneConfig, {"init": "scratch", **changes, "mixing": {"mixup": 0, "cutmix": 0}}, "recipe.yaml"
    )
