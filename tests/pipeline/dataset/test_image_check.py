"""The check and the conversion of images before they are written to a shard."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.build.synthetic import draw_scene
from pipeline.dataset.image_check import Conversion, check_image
from pipeline.decode.cpu import decode_with_pillow
from tests.support.data.odd_images import saved, zoo

SCENE = draw_scene(0, 3, 3)


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(np.float64)


def decodes(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception:
        return False
    return True


def passes(data: bytes) -> bool:
    try:
        check_image(data)
    except ValueError:
        return False
    return True


@given(at=st.integers(0, len(SCENE) - 1), bit=st.integers(0, 7), progressive=st.booleans(), cut=st.booleans())
def test_exactly_the_images_that_decode_pass_the_check(
    at: int, bit: int, progressive: bool, cut: bool
) -> None:
    """The check decodes at 1/8 resolution and must agree with a full decode."""
    data = bytearray(PROGRESSIVE if progressive else SCENE)
    at %= len(data)
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    assert passes(bytes(data)) == decodes(bytes(data))


PROGRESSIVE = saved(Image.open(io.BytesIO(SCENE)), "JPEG", progressive=True, quality=90)


def test_a_header_check_does_not_decode() -> None:
    half = SCENE[: len(SCENE) // 2]
    assert check_image(half, decode=False).data == half
    with pytest.raises(ValueError, match="truncated"):
        check_image(half)
    with pytest.raises(ValueError, match="not an image"):
        check_image(b"GIF8 or what", decode=False)


@pytest.mark.parametrize(
    ("conversion", "size"),
    [
        (Conversion(shorter_side=128), lambda w, h: 128 / min(w, h)),
        (Conversion(longer_side=200), lambda w, h: 200 / max(w, h)),
        (Conversion(shorter_side=200, longer_side=210), lambda w, h: min(200 / min(w, h), 210 / max(w, h))),
        (Conversion(longer_side=100_000), lambda w, h: 1),
    ],
)
def test_large_images_are_scaled_down_and_small_ones_unchanged(conversion: Conversion, size: object) -> None:
    with Image.open(io.BytesIO(SCENE)) as image:
        width, height = image.size
    scale = size(width, height)
    checked = check_image(SCENE, conversion=conversion)
    assert (checked.width, checked.height) == (round(width * scale), round(height * scale))
    assert checked.changed == (scale < 1)
    if not checked.changed:
        assert checked.data == SCENE
        return
    with Image.open(io.BytesIO(SCENE)) as image:
        expected = np.asarray(image.resize((checked.width, checked.height), Image.Resampling.BICUBIC))
    assert np.abs(pixels(checked.data) - expected).mean() < 3


@pytest.mark.parametrize("name", sorted(zoo()))
def test_an_odd_image_converted_to_rgb_jpeg_looks_as_the_decoder_shows_it(name: str) -> None:
    data = zoo()[name]
    unchanged = check_image(data)
    assert (unchanged.data, unchanged.changed) == (data, False)
    is_odd = name.startswith("PNG") or name == "CMYK JPEG"
    assert bool(unchanged.odd) == is_odd
    converted = check_image(data, conversion=Conversion(rgb_jpeg=True, quality=95))
    assert converted.changed == is_odd
    assert converted.extension == "jpg"
    with Image.open(io.BytesIO(converted.data)) as image:
        assert image.mode in ("RGB", "L")
    assert np.abs(decoded(converted.data) - decoded(data)).mean() < 3


def decoded(data: bytes) -> np.ndarray:
    """The whole image as the decoder returns it."""
    with Image.open(io.BytesIO(data)) as image:
        box = (0, 0, image.height, image.width)
    out = np.zeros((3, 96, 96), np.uint8)
    decode_with_pillow(data, box, False, out)
    return out.astype(np.float64)
