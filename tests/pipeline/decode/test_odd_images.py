"""Odd images: every decoder gives the same crop, or reports the same bad sample; and damage crashes none."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decode import cpu as cpu_module
from pipeline.decode.decoder import Decoder, DecoderName, Encoded
from pipeline.decode.factory import make_decoder
from tests.support.data.odd_images import picture, saved, zoo

SIZE = 64
Box = tuple[int, int, int, int]  # y, x, height, width
ODD_JPEGS = {path.stem: path.read_bytes() for path in sorted((Path(__file__).parent / "odd_jpegs").iterdir())}
pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def decoder(name: DecoderName, size: int = SIZE) -> Decoder:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    return make_decoder(name, size, 1)


def one(decoder: Decoder, image: Encoded, box: Box, flip: bool = False) -> np.ndarray | None:
    """float[3, size, size], or None for a bad sample."""
    decoded = decoder([image], np.array([box]), np.array([flip]))
    if decoded.bad:
        assert decoded.bad[0]
        assert not decoded.images.any()
        return None
    return decoded.images[0].numpy().astype(float)


def by_hand(image: bytes, box: Box, flip: bool = False) -> np.ndarray:
    out = np.zeros((3, SIZE, SIZE), np.uint8)
    cpu_module.decode_with_pillow(image, box, flip, out)
    return out.astype(float)


BOUND = {"PNG 1-bit": 1.0, "PNG 16-bit grey": 1.0, "cmyk": 1.0, "ycck": 1.0}
BAD_JPEGS = {"12-bit", "lossless"}


@pytest.mark.parametrize("kind", zoo())
@pytest.mark.parametrize("flip", [False, True])
def test_decoders_agree_on_odd_images(kind: str, flip: bool) -> None:
    box = (20, 33, 150, 190)
    ours, dali = (one(decoder(name), zoo()[kind], box, flip) for name in ("cpu", "dali"))
    assert ours is not None
    assert dali is not None
    assert abs(ours - dali).mean() < BOUND.get(kind, 0.3)
    assert abs(ours - by_hand(zoo()[kind], box, flip)).mean() < 0.05


@pytest.mark.parametrize(
    "box", [(0, 0, 47, 61), (5, 7, 30, 40), (46, 60, 1, 1), (10, 17, 1, 20), (40, 3, 7, 58)]
)
@pytest.mark.parametrize("kind", ODD_JPEGS)
def test_decoders_agree_on_odd_jpegs(kind: str, box: Box) -> None:
    ours = one(decoder("cpu"), ODD_JPEGS[kind], box)
    if kind != "lossless":  # see the docstring of pipeline.decode
        dali = one(decoder("dali"), ODD_JPEGS[kind], box)
        assert (dali is None) == (ours is None)
    assert (ours is None) == (kind in BAD_JPEGS)
    if ours is not None:
        assert abs(ours - dali).mean() < BOUND.get(kind, 0.3)
        assert abs(ours - by_hand(ODD_JPEGS[kind], box)).mean() < 0.05


@pytest.mark.parametrize("name", ["cpu", "dali"])
@pytest.mark.parametrize("kind", ["baseline 4:2:0", "progressive", "PNG RGB", "CMYK JPEG"])
@pytest.mark.parametrize("box", [(0, 0, 204, 10), (0, 0, 10, 302), (203, 301, 1, 1), (200, 0, 2000, 10)])
def test_a_box_outside_the_image_is_a_bad_sample(name: str, kind: str, box: Box) -> None:
    assert one(decoder(name), zoo()[kind], box) is None


@settings(max_examples=150)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    mode=st.sampled_from(["RGB", "L"]),
    options=st.sampled_from(
        [
            {"subsampling": 0},
            {"subsampling": 1},
            {"subsampling": 2},
            {"progressive": True},
            {"restart_marker_blocks": 2},
            {"optimize": True},
            {"quality": 100, "subsampling": 0},  # codes of up to 16 bits
        ]
    ),
    size=st.integers(1, 40),
    flip=st.booleans(),
    data=st.data(),
)
def test_any_crop_of_any_jpeg_is_pillows(
    width: int, height: int, mode: str, options: dict, size: int, flip: bool, data: st.DataObject
) -> None:
    """Crops that touch edges, of one pixel, smaller and larger than the result; images of any size."""
    image = saved(picture(width, height).convert(mode), "JPEG", **{"quality": 90, **options})
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    box = (data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w)
    expected = np.zeros((3, size, size), np.uint8)
    cpu_module.decode_with_pillow(image, box, flip, expected)
    decoded = one(decoder("cpu", size), image, box, flip)
    assert decoded is not None
    assert abs(decoded - expected).max() <= 2


def test_large_crops_shrink_as_pillows() -> None:
    image = saved(picture(3000, 2000), "JPEG", quality=90)
    for box in ((0, 0, 2000, 3000), (3, 5, 1990, 20), (100, 17, 13, 2900)):
        decoded = one(decoder("cpu"), image, box)
        assert decoded is not None
        assert abs(decoded - by_hand(image, box)).max() <= 2


def test_without_the_extension_pillow_makes_the_same_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    image, box = zoo()["baseline 4:2:0"], (20, 33, 150, 190)
    fast = one(decoder("cpu"), image, box, True)
    monkeypatch.setattr(cpu_module, "jpeg_crop", None)
    slow = one(decoder("cpu"), image, box, True)
    assert fast is not None
    assert slow is not None
    assert abs(fast - slow).mean() < 0.05


@settings(max_examples=300)
@given(
    kind=st.sampled_from(
        [
            "baseline 4:2:0",
            "progressive",
            "restart markers",
            "grey JPEG",
            "CMYK JPEG",
            "PNG RGB",
            "PNG palette",
        ]
    ),
    at=st.floats(0, 1, exclude_max=True),
    damage=st.one_of(st.none(), st.binary(min_size=1, max_size=40)),
)
def test_damage_anywhere_gives_pixels_or_a_bad_sample(kind: str, at: float, damage: bytes | None) -> None:
    """Cut off (None) or overwritten: never an exception, a crash or a hang; the decoder still works."""
    sound, box = zoo()[kind], (20, 33, 150, 190)
    place = int(at * len(sound))
    image = sound[:place] + (b"" if damage is None else damage + sound[place + len(damage) :])
    one(decoder("cpu"), image, box)
    assert one(decoder("cpu"), sound, box) is not None


def test_the_bytes_may_be_views_and_empty() -> None:
    image, box = zoo()["baseline 4:2:0"], (20, 33, 150, 190)
    view = one(decoder("cpu"), memoryview(b"xx" + image)[2:], box)
    assert view is not None
    assert (view == one(decoder("cpu"), image, box)).all()
    assert one(decoder("cpu"), b"", box) is None


def test_the_extension_checks_what_it_is_handed() -> None:
    if cpu_module.jpeg_crop is None:
        pytest.skip("jpeg_crop is not built here")
    jpeg, crop = zoo()["baseline 4:2:0"], cpu_module.jpeg_crop.crop
    with pytest.raises(ValueError, match="out"):
        crop(jpeg, 0, 0, 1, 1, False, np.zeros(7, np.uint8).data)
    for shape in ((1, 3, 1), (3, 0, 1), (3, 1, 0), (3, 1, 1, 1)):
        with pytest.raises(ValueError, match="out"):
            crop(jpeg, 0, 0, 1, 1, False, np.zeros(shape, np.uint8).data)
    with pytest.raises((BufferError, ValueError)):
        crop(jpeg, 0, 0, 1, 1, False, np.zeros((4, 4, 3), np.uint8).transpose(2, 0, 1).data)
    for box in ((-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)):
        with pytest.raises(ValueError, match="box"):
            crop(jpeg, *box, False, np.zeros((3, 1, 1), np.uint8).data)
    assert crop(zoo()["PNG RGB"], 0, 0, 1, 1, False, np.zeros((3, 1, 1), np.uint8).data) is None
