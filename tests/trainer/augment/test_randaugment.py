"""RandAugment's operations are Pillow's, with timm's strengths."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from pipeline.build.synthetic import draw_scene
from trainer.augment.randaugment import OPERATIONS, randaugment

FILL = (124, 116, 104)
SIZE = 64
Pillows = Callable[[Image.Image, float, float], Image.Image]


def affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL
    )


def solarize_add(image: Image.Image, level: float, _: float) -> Image.Image:
    added = int(level * 110)
    return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * 3)


def enhanced(kind: type) -> Pillows:
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1 + sign * level * 0.9))


# timm's auto_augment.py: _RAND_INCREASING_TRANSFORMS and LEVEL_TO_ARG; levels as a share of 10.
PILLOW: dict[str, Pillows] = {
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": lambda image, level, sign: image.rotate(
        sign * level * 30, Image.Resampling.BICUBIC, fillcolor=FILL
    ),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 4 - int(level * 4)),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - min(256, int(level * 256))),
    "solarize_add": solarize_add,
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign: affine(image, (1, sign * level * 0.3, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign: affine(image, (1, 0, 0, sign * level * 0.3, 1, 0)),
    "translate_x": lambda image, level, sign: affine(image, (1, 0, sign * level * 0.45 * SIZE, 0, 1, 0)),
    "translate_y": lambda image, level, sign: affine(image, (1, 0, 0, 0, 1, sign * level * 0.45 * SIZE)),
}
# Where an image ends, Pillow's bicubic repeats the last pixel and ours blends with the fill colour.
GEOMETRIC = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(draw_scene(0, i, i % 5))).convert("RGB").resize((SIZE, SIZE)) for i in range(6)
    ]


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 255


def test_there_are_fifteen() -> None:
    assert set(OPERATIONS) == set(PILLOW)
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("name", PILLOW)
def test_operations_are_pillows(name: str, images: list[Image.Image]) -> None:
    levels, signs = [0.0, 0.3, 0.85, 0.9, 0.95, 1.0], [1, -1, 1, -1, 1, -1]
    fill = torch.tensor(FILL) / 255
    got = OPERATIONS[name](as_tensor(images), torch.tensor(levels), torch.tensor(signs).float(), fill)
    expected = as_tensor(
        [PILLOW[name](image, level, sign) for image, level, sign in zip(images, levels, signs, strict=True)]
    )
    apart = (got - expected).abs() * 255
    if name in GEOMETRIC:
        assert apart.mean() < 2
        assert (apart > 8).float().mean() < 0.06  # at the borders
    else:
        assert apart.max() <= 2
        assert apart.mean() < 0.7


def test_it_is_a_pure_function_of_each_sample(images: list[Image.Image]) -> None:
    batch = as_tensor(images * 8)
    ids = np.arange(100, 148)
    fill = torch.tensor(FILL) / 255
    whole = randaugment(batch, fill, 0, 5, ids)
    torch.testing.assert_close(randaugment(batch[7:19], fill, 0, 5, ids[7:19]), whole[7:19])
    other_epoch = randaugment(batch, fill, 0, 6, ids)
    assert ((whole - other_epoch).abs().amax(dim=(1, 2, 3)) > 0).float().mean() > 0.8
    untouched = ((whole - batch).abs().amax(dim=(1, 2, 3)) == 0).float().mean()
    assert 0.08 < untouched < 0.5  # a quarter, and what operations do not change
    assert whole.min() >= 0
    assert whole.max() <= 1
