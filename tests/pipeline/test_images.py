"""What is looked at in an image, and what may be changed of it."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_images import saved, zoo
from PIL import Image

from pipeline.decode.cpu import decode_with_pillow
from pipeline.images import Changes, check_image
from pipeline.scenes import draw_scene

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
def test_what_decodes_passes_and_nothing_else(at: int, bit: int, progressive: bool, cut: bool) -> None:
    """Though an eighth of the size is decoded."""
    data = bytearray(PROGRESSIVE if progressive else SCENE)
    at %= len(data)
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    assert passes(bytes(data)) == decodes(bytes(data))


PROGRESSIVE = saved(Image.open(io.BytesIO(SCENE)), "JPEG", progressive=True, quality=90)


def test_a_look_at_the_header_does_not_decode() -> None:
    half = SCENE[: len(SCENE) // 2]
    assert check_image(half, decode=False).data == half
    with pytest.raises(ValueError, match="truncated"):
        check_image(half)
    with pytest.raises(ValueError, match="not an image"):
        check_image(b"GIF8 or what", decode=False)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        (Changes(shorter_side=128), lambda w, h: 128 / min(w, h)),
        (Changes(longer_side=200), lambda w, h: 200 / max(w, h)),
        (Changes(shorter_side=200, longer_side=210), lambda w, h: min(200 / min(w, h), 210 / max(w, h))),
        (Changes(longer_side=100_000), lambda w, h: 1),
    ],
)
def test_sides_are_capped_and_what_is_small_is_untouched(changes: Changes, size: object) -> None:
    with Image.open(io.BytesIO(SCENE)) as image:
        width, height = image.size
    scale = size(width, height)  # type: ignore[operator]
    checked = check_image(SCENE, changes=changes)
    assert (checked.width, checked.height) == (round(width * scale), round(height * scale))
    assert checked.changed == (scale < 1)
    if not checked.changed:
        assert checked.data == SCENE
        return
    with Image.open(io.BytesIO(SCENE)) as image:
        expected = np.asarray(image.resize((checked.width, checked.height), Image.Resampling.BICUBIC))
    assert np.abs(pixels(checked.data) - expected).mean() < 3


@pytest.mark.parametrize("name", sorted(zoo()))
def test_an_rgb_jpeg_of_an_odd_image_shows_what_the_decoder_sees(name: str) -> None:
    data = zoo()[name]
    left = check_image(data)
    assert (left.data, left.changed) == (data, False)
    is_odd = name.startswith("PNG") or name == "CMYK JPEG"
    assert bool(left.odd) == is_odd
    made = check_image(data, changes=Changes(rgb_jpeg=True, quality=95))
    assert made.changed == is_odd
    assert made.extension == "jpg"
    with Image.open(io.BytesIO(made.data)) as image:
        assert image.mode in ("RGB", "L")
    assert np.abs(seen(made.data) - seen(data)).mean() < 3


def seen(data: bytes) -> np.ndarray:
    """What the decoder makes of all of an image."""
    with Image.open(io.BytesIO(data)) as image:
        box = (0, 0, image.height, image.width)
    out = np.zeros((3, 96, 96), np.uint8)
    decode_with_pillow(data, box, False, out)
    return out.astype(np.float64)
