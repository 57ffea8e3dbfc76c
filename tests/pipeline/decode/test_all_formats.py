"""Every format gives the same crop in every decoder, for every type of batch."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.decode.decoder import Decoder, DecoderName
from pipeline.decode.factory import make_decoder
from pipeline.images.pixels import RGB, Pixels
from tests.support.data.formats import LOSS, deep, files, grey8, npy, rgb8, tiff
from tests.support.data.odd_images import picture, png, saved

SIZE = (48, 64)
BOX = (20, 33, 150, 190)
DECODERS: list[DecoderName] = ["cpu", "dali"]
GREY = Pixels(channels=1)
DEEP, DEEP_GREY = Pixels(dtype="uint16"), Pixels(channels=1, dtype="uint16")


@cache
def decoder(name: DecoderName, pixels: Pixels = RGB) -> Decoder:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    return make_decoder(name, SIZE, 1, pixels=pixels)


def decode(decoder: Decoder, data: list[bytes], box: tuple = BOX, flip: bool = False) -> np.ndarray:
    """float[n, channels, h, w]; none may be bad."""
    decoded = decoder(data, np.array([box] * len(data)), np.array([flip] * len(data)))
    assert not decoded.bad
    return decoded.images.to(torch.float64).numpy()


def reason(decoder: Decoder, data: bytes, box: tuple = (0, 0, 4, 4)) -> str:
    decoded = decoder([data], np.array([box]), np.array([False]))
    assert not decoded.images.to(torch.float32).any()
    return decoded.bad[0]


def expected(pixels: np.ndarray, flip: bool = False) -> np.ndarray:
    """The picture's crop, resized by Pillow."""
    y, x, h, w = BOX
    image = Image.fromarray(pixels[y : y + h, x : x + w].squeeze()).resize(
        SIZE[::-1], Image.Resampling.BICUBIC
    )
    crop = np.asarray(image.convert("RGB")).astype(float).transpose(2, 0, 1)
    return crop[..., ::-1] if flip else crop


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("flip", [False, True])
def test_every_format_gives_the_pictures_crop(name: DecoderName, flip: bool) -> None:
    """In one batch, so DALI's crops and those that the CPU makes for it are mixed."""
    known = files()
    crops = decode(decoder(name), list(known.values()), flip=flip)
    for (format, kind), crop in zip(known, crops, strict=True):
        source = grey8() if kind.startswith("grey") else rgb8()
        bound = LOSS.get(format, 0.0) + (1.0 if "-bit" in kind else 0.3)
        assert abs(crop - expected(source, flip)).mean() < bound, (format, kind)


def test_both_decoders_give_the_same_crops() -> None:
    known = files()
    cpu, dali = (decode(decoder(name), list(known.values())) for name in DECODERS)
    for i, (format, kind) in enumerate(known):
        assert abs(cpu[i] - dali[i]).mean() < (1.0 if "-bit" in kind else 0.3), (format, kind)


@pytest.mark.parametrize("name", DECODERS)
def test_grey_batches_have_the_luma(name: DecoderName) -> None:
    known = files()
    crops = decode(decoder(name, GREY), list(known.values()))
    assert crops.shape == (len(known), 1, *SIZE)
    for (format, kind), crop in zip(known, crops, strict=True):
        assert abs(crop[0] - expected(grey8())[0]).mean() < LOSS.get(format, 0.0) + 1.0, (format, kind)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("pixels", [DEEP, DEEP_GREY])
def test_16_bit_batches_keep_16_bits(name: DecoderName, pixels: Pixels) -> None:
    known = {key: data for key, data in files().items() if "16-bit" in key[1]}
    made = decoder(name, pixels)(
        list(known.values()), np.array([BOX] * len(known)), np.zeros(len(known), bool)
    )
    assert made.images.dtype == torch.uint16
    for (format, kind), crop in zip(known, made.images.to(torch.float64).numpy(), strict=True):
        source = grey8() if kind.startswith("grey") or pixels.channels == 1 else rgb8()
        assert crop.shape == (pixels.channels, *SIZE)
        assert abs(crop / 257 - expected(source)[: pixels.channels]).mean() < 1.0, (format, kind)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_any_number_of_bands_is_cropped_as_torch_resizes(name: DecoderName, dtype: str) -> None:
    rng = np.random.default_rng(0)
    pixels = (rng.random((120, 150, 12)) * (1 if dtype == "float32" else np.iinfo(dtype).max)).astype(dtype)
    data = [npy(pixels), tiff(pixels, photometric="minisblack", planarconfig="contig")]
    crops = decode(decoder(name, Pixels(channels=12, dtype=dtype)), data, (10, 20, 80, 99), flip=True)
    planes = torch.from_numpy(pixels[10:90, 20:119].transpose(2, 0, 1).astype(np.float32))
    wanted = F.interpolate(planes[None], SIZE, mode="bicubic", antialias=True)[0].flip(2).numpy()
    top = np.inf if dtype == "float32" else np.iinfo(dtype).max
    for crop in crops:
        assert abs(crop - wanted.clip(-np.inf if dtype == "float32" else 0, top)).max() <= (
            0 if dtype == "float32" else 0.5
        )


def test_an_image_of_another_type_is_a_bad_sample_with_a_reason() -> None:
    bands, floats = npy(np.zeros((9, 9, 5), np.uint8)), npy(np.ones((9, 9, 3), np.float32))
    hole = np.ones((9, 9, 3), np.float32)
    hole[3, 3] = np.nan
    float_decoder = decoder("cpu", Pixels(dtype="float32"))
    assert reason(decoder("cpu"), bands) == "the image has 5 channels, not 3"
    assert reason(decoder("cpu", GREY), bands) == "the image has 5 channels, not 1"
    assert reason(decoder("cpu"), floats) == "the image has float32 values, not uint8"
    assert reason(float_decoder, png(rgb8())) == "the image has uint8 values, not float32"
    assert "NaN" in reason(float_decoder, npy(hole))
    assert "not an image" in reason(decoder("cpu"), b"%PDF-1.7 or what")
    assert "smaller than its crop" in reason(decoder("cpu"), tiff(rgb8(), photometric="rgb"), (0, 0, 204, 9))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("pixels", [RGB.model_copy(update={"bits": 12}), Pixels(dtype="uint16", bits=12)])
def test_12_bits_in_16_are_as_bright_as_they_are(name: DecoderName, pixels: Pixels) -> None:
    """The dataset says 12 bits, or the file does: sBIT, BitsPerSample, or the precision of the format."""
    twelve = deep(rgb8()) >> 4
    data = [png(twelve), npy(twelve), tiff(twelve, photometric="rgb")]
    crops = decode(decoder(name, pixels), data)
    for crop in crops * (1 if pixels.dtype == "uint8" else 255 / 4095):
        assert abs(crop - expected(rgb8())).mean() < 1.0


@pytest.mark.parametrize("name", DECODERS)
def test_a_png_that_says_how_many_bits_it_has_is_read_by_them(name: DecoderName) -> None:
    """The standard wants values scaled to 16 bits. Some programs write sBIT and do not scale."""
    twelve = deep(rgb8()) >> 4
    unscaled = png(twelve, sbit=12)
    shifted = png(twelve << 4, sbit=12)
    replicated = png((twelve << 4) | (twelve >> 8), sbit=12)
    for crop in decode(decoder(name), [unscaled, shifted, replicated]):
        assert abs(crop - expected(rgb8())).mean() < 1.0


@settings(max_examples=100)
@given(
    key=st.sampled_from(sorted(files())),
    at=st.floats(0, 1, exclude_max=True),
    damage=st.one_of(st.none(), st.binary(min_size=1, max_size=40)),
)
def test_damage_anywhere_gives_pixels_or_a_bad_sample(key: tuple, at: float, damage: bytes | None) -> None:
    sound = files()[key]
    place = int(at * len(sound))
    data = sound[:place] + (b"" if damage is None else damage + sound[place + len(damage) :])
    made = decoder("cpu")([data, sound], np.array([BOX, BOX]), np.zeros(2, bool))
    assert 1 not in made.bad


def test_the_first_image_of_an_animation_is_decoded() -> None:
    frames = [picture(), Image.fromarray(255 - rgb8())]
    gif = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    pages = tiff(np.stack([rgb8(), 255 - rgb8()]), photometric="rgb")
    for name in DECODERS:
        for crop in decode(decoder(name), [gif, pages]):
            assert abs(crop - expected(rgb8())).mean() < LOSS["GIF"]
