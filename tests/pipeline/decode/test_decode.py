"""All decoders make the same crops from the same boxes, and report the same bad images."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.build.synthetic import draw_scene
from pipeline.decode.decoder import Decoder, DecoderName, Size
from pipeline.decode.factory import make_decoder
from pipeline.loading.crops import random_flips, random_resized_crops
from tests.support.datasets import IMAGENET_SAMPLE

SIZE = 96
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["cpu", "dali"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return make_decoder(request.param, SIZE, 2)


def boxes_of(images: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array([Image.open(io.BytesIO(image)).size for image in images])
    ids = np.arange(len(images))
    return random_resized_crops(0, 0, ids, sizes[:, 1], sizes[:, 0]), random_flips(0, 0, ids)


def crop_by_hand(image: bytes, box: np.ndarray, flip: bool, size: Size = (SIZE, SIZE)) -> np.ndarray:
    y, x, h, w = box.tolist()
    crop = Image.open(io.BytesIO(image)).convert("RGB").crop((x, y, x + w, y + h)).resize(size[::-1], 3)
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop).transpose(2, 0, 1)


def test_crops_are_those_of_the_boxes(decoder: Decoder) -> None:
    images = [draw_scene(0, i, i % 10) for i in range(12)]
    if IMAGENET_SAMPLE:
        images += [path.read_bytes() for path in sorted(Path(IMAGENET_SAMPLE).glob("*/*.JPEG"))[:60]]
    boxes, flips = boxes_of(images)
    decoded = decoder(images, boxes, flips)
    assert decoded.bad == {}
    assert tuple(decoded.images.shape) == (len(images), 3, SIZE, SIZE)
    for i, image in enumerate(images):
        expected = crop_by_hand(image, boxes[i], bool(flips[i])).astype(float)
        assert abs(decoded.images[i].numpy() - expected).mean() < 2, i


@pytest.mark.parametrize("name", ["cpu", "dali"])
@pytest.mark.parametrize("size", [(48, 80), (70, 33)])
def test_images_need_not_be_square(name: DecoderName, size: Size) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(draw_scene(0, 1, 1))).save(buffer, "PNG")  # which Pillow decodes
    images = [draw_scene(0, 0, 0), buffer.getvalue()]
    boxes, flips = np.array([[3, 5, 90, 70], [0, 0, 60, 110]]), np.array([True, False])
    decoded = make_decoder(name, size, 1)(images, boxes, flips)
    assert decoded.bad == {}
    for i, image in enumerate(images):
        expected = crop_by_hand(image, boxes[i], bool(flips[i]), size).astype(float)
        assert abs(decoded.images[i].numpy() - expected).mean() < 2, i


def test_batches_of_any_size_follow_each_other(decoder: Decoder) -> None:
    images = [draw_scene(0, i, 0) for i in range(9)]
    boxes, flips = boxes_of(images)
    whole = decoder(images, boxes, flips).images
    for n in (1, 4, 9, 2):
        assert (decoder(images[:n], boxes[:n], flips[:n]).images == whole[:n]).all()


def test_exif_orientation_is_ignored(decoder: Decoder) -> None:
    image = Image.open(io.BytesIO(draw_scene(0, 0, 3)))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90°"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    boxes, flips = boxes_of([buffer.getvalue()])
    decoded = decoder([buffer.getvalue()], boxes, flips)
    expected = crop_by_hand(buffer.getvalue(), boxes[0], bool(flips[0])).astype(float)
    assert abs(decoded.images[0].numpy() - expected).mean() < 2


def test_bad_images_keep_their_place_and_do_not_spoil_the_others(decoder: Decoder) -> None:
    images = [draw_scene(0, i, 0) for i in range(6)]
    boxes, flips = boxes_of(images)
    sound = decoder(images, boxes, flips).images
    damaged = list(images)
    damaged[1] = images[1][:3000]
    damaged[4] = b"this is no image"
    for _ in range(2):  # and the decoder still works afterwards
        decoded = decoder(damaged, boxes, flips)
        assert sorted(decoded.bad) == [1, 4]
        assert all(decoded.bad.values())
        good = [0, 2, 3, 5]
        assert (decoded.images[good] == sound[good]).all()
        assert (decoded.images[[1, 4]] == 0).all()
    assert (decoder(images, boxes, flips).images == sound).all()


def test_batches_that_decode_at_once_do_not_feel_each_other(decoder: Decoder) -> None:
    """One thread's batches have a bad image each, which ends a pipeline of DALI's; the other's have none."""
    images = [draw_scene(0, i, 0) for i in range(8)]
    boxes, flips = boxes_of(images)
    sound = decoder(images, boxes, flips).images
    damaged = list(images)
    damaged[5] = images[5][:3000]
    with ThreadPoolExecutor(2) as pool:
        batches = [pool.submit(decoder, damaged if i % 2 else images, boxes, flips) for i in range(12)]
        for i, decoded in enumerate(batch.result() for batch in batches):
            if i % 2:
                assert list(decoded.bad) == [5]
                assert not decoded.images[5].any()
            else:
                assert decoded.bad == {}
            good = [k for k in range(8) if k not in decoded.bad]
            assert (decoded.images[good] == sound[good]).all()
    decoder.close()


def test_16_bit_png_is_scaled_not_clipped(decoder: Decoder) -> None:
    ramp = np.linspace(0, 65535, 200 * 300).reshape(200, 300).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    image = decoder([buffer.getvalue()], np.array([[0, 0, 200, 300]]), np.array([False])).images[0].float()
    assert abs(float(image.mean()) - 127.5) < 2
    assert image.min() < 3
    assert image.max() > 252


def test_greyscale_becomes_rgb(decoder: Decoder) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(draw_scene(0, 0, 3))).convert("L").save(buffer, "JPEG")
    boxes, flips = boxes_of([buffer.getvalue()])
    image = decoder([buffer.getvalue()], boxes, flips).images[0]
    assert (image[0] == image[1]).all()
    assert (image[0] == image[2]).all()
