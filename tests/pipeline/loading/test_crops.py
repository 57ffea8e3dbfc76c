"""Crops and flips are pure functions, and torchvision's rule."""

import math
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.hashing import hash64, uniform
from pipeline.loading.crops import centre_crops, random_flips, random_resized_crops

sizes = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=30)


@given(sizes, st.integers(0, 2**31), st.integers(0, 900))
def test_crops_are_inside_the_image_and_not_empty(
    sizes: list[tuple[int, int]], seed: int, epoch: int
) -> None:
    heights, widths = np.array(sizes).T
    ids = np.arange(len(sizes))
    for boxes in (random_resized_crops(seed, epoch, ids, heights, widths), centre_crops(heights, widths)):
        y, x, h, w = boxes.T
        assert (h >= 1).all()
        assert (w >= 1).all()
        assert (y >= 0).all()
        assert (x >= 0).all()
        assert (y + h <= heights).all()
        assert (x + w <= widths).all()


@given(st.integers(0, 2**31), st.integers(0, 900), st.integers(0, 10**6))
def test_a_sample_is_cropped_alike_in_any_company(seed: int, epoch: int, sample: int) -> None:
    ids = np.array([sample, sample + 1, sample + 7])
    h, w = np.array([375, 400, 333]), np.array([500, 300, 333])
    together = random_resized_crops(seed, epoch, ids, h, w)
    for i in (2, 0, 1):
        alone = random_resized_crops(seed, epoch, ids[i : i + 1], h[i : i + 1], w[i : i + 1])
        assert (alone[0] == together[i]).all()
        assert random_flips(seed, epoch, ids[i : i + 1])[0] == random_flips(seed, epoch, ids)[i]


def test_areas_and_ratios_are_those_of_the_paper() -> None:
    n = 20_000
    ids = np.arange(n)
    boxes = random_resized_crops(0, 0, ids, np.full(n, 450), np.full(n, 450))
    area = boxes[:, 2] * boxes[:, 3] / 450**2
    ratio = boxes[:, 3] / boxes[:, 2]
    assert area.min() > 0.19
    assert area.max() <= 1.0
    assert abs(area.mean() - _mean_area_of_the_rule(450, 450)) < 0.005
    assert ratio.min() > 0.745
    assert ratio.max() < 1.345
    assert abs(np.log(ratio).mean()) < 0.02
    assert {0, 1} <= set(boxes[:, 0])  # the border can be reached
    assert (boxes[:, 0] + boxes[:, 2] == 450).any()
    other = random_resized_crops(0, 1, ids, np.full(n, 450), np.full(n, 450))
    assert (boxes != other).any(axis=1).mean() > 0.99  # another epoch, other crops


def _mean_area_of_the_rule(height: int, width: int) -> float:
    """Mean area of RandomResizedCrop as torchvision documents it, one draw at a time."""
    rng = random.Random(0)
    areas = []
    for _ in range(20_000):
        for _ in range(10):
            area = height * width * rng.uniform(0.2, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w <= width and h <= height:
                areas.append(w * h / (height * width))
                break
    return sum(areas) / len(areas)


def test_extreme_shapes_fall_back_to_the_centre() -> None:
    boxes = random_resized_crops(0, 0, np.arange(3), np.array([1000, 10, 1]), np.array([10, 1000, 1]))
    assert boxes.tolist() == [[493, 0, 13, 10], [0, 493, 10, 13], [0, 0, 1, 1]]


def test_flips_are_fair() -> None:
    assert abs(random_flips(0, 0, np.arange(100_000)).mean() - 0.5) < 0.01


def test_hashes_are_uniform_and_independent() -> None:
    x = uniform(1, 2, np.arange(100_000))
    assert x.min() >= 0
    assert x.max() < 1
    assert np.histogram(x, 20)[0].min() > 4700
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.01
    assert hash64(1, 2) != hash64(2, 1)
    assert int(hash64(0)) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0
