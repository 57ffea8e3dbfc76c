"""DALI on a GPU gives the same images as the CPU decoder, and they reach the trainer undamaged.

pytest tests/gpu                        # builds a dataset of synthetic scenes
MAESTREAM_DATA=DATASET pytest tests/gpu # uses an existing dataset, so webdataset and Ray need not be installed
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.build.synthetic import draw_scene
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.cpu import CpuDecoder
from pipeline.decode.decoder import Decoder
from pipeline.decode.gpu_check import gpu_crop_mismatch
from pipeline.loading.crops import random_flips, random_resized_crops
from pipeline.loading.loader import Loader
from pipeline.loading.order import Order
from tests.support.data.odd_images import picture, saved, zoo
from tests.support.datasets import build_dataset
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
GPU = torch.device("cuda")
SIZE = 96
MAX_DIFFERENCE = 2.0  # mean difference of a crop from the CPU's, in grey levels
ODD_JPEGS = sorted((ROOT / "tests/pipeline/decode/odd_jpegs").iterdir())
Boxes = list[tuple[int, int, int, int]]  # (y, x, height, width)
MakeDecoder = Callable[[], Decoder]


@pytest.fixture(scope="module")
def problem() -> str | None:
    pytest.importorskip("nvidia.dali")
    return gpu_crop_mismatch(GPU)  # in a process of its own, because a crash would end the tests


def test_gpu_crops_match_the_cpus(problem: str | None) -> None:
    assert problem is None


@pytest.fixture(scope="module")
def make_dali(problem: str | None) -> MakeDecoder:
    if problem:
        pytest.skip(problem)
    from pipeline.decode.dali import DaliDecoder

    return lambda: DaliDecoder(SIZE, 4, GPU)


@pytest.fixture(scope="module")
def dali(make_dali: MakeDecoder) -> Iterator[Decoder]:
    with closing(make_dali()) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def cpu() -> Iterator[Decoder]:
    with closing(CpuDecoder(SIZE, 4)) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    if "MAESTREAM_DATA" in os.environ:
        return open_dataset(os.environ["MAESTREAM_DATA"])
    pytest.importorskip("webdataset")
    return build_dataset("synthetic:?count=300&classes=7", str(tmp_path_factory.mktemp("data") / "scenes"))


def assert_same(images: torch.Tensor, expected: torch.Tensor, max_difference: float = MAX_DIFFERENCE) -> None:
    difference = (images.cpu().float() - expected.cpu().float()).abs().mean(dim=(1, 2, 3))
    assert difference.max() <= max_difference, difference.tolist()


def scenes(count: int) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Synthetic images, with random crops and flips."""
    ids, images = np.arange(count), [draw_scene(0, i, i % 10) for i in range(count)]
    widths, heights = np.array([Image.open(io.BytesIO(image)).size for image in images]).T
    return images, random_resized_crops(0, 0, ids, heights, widths), random_flips(0, 0, ids)


# ---- pixels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", zoo())
def test_every_kind_of_image_matches_the_cpu(dali: Decoder, cpu: Decoder, kind: str) -> None:
    boxes: Boxes = [
        (20, 33, 150, 190),
        (0, 0, 203, 301),
        (0, 0, 99, 101),
        (103, 201, 100, 100),
        (77, 3, 31, 290),
    ]
    images, flips = [zoo()[kind]] * len(boxes), np.arange(len(boxes)) % 2 == 0
    decoded = dali(images, np.array(boxes), flips)
    assert decoded.bad == {}
    assert decoded.images.device.type == "cuda"
    # A dithered 1-bit image is all noise: DALI's resize differs from Pillow's by 4 there, also on a CPU.
    max_difference = 5 if kind == "PNG 1-bit" else MAX_DIFFERENCE
    assert_same(decoded.images, cpu(images, np.array(boxes), flips).images, max_difference)


def test_all_kinds_in_one_batch(dali: Decoder, cpu: Decoder) -> None:
    images = list(zoo().values())
    boxes, flips = np.array([(20, 33, 150, 190)] * len(images)), np.zeros(len(images), bool)
    decoded = dali(images, boxes, flips)
    assert decoded.bad == {}
    assert_same(decoded.images, cpu(images, boxes, flips).images)


@pytest.mark.parametrize("path", ODD_JPEGS, ids=lambda path: path.stem)
def test_odd_jpegs_match_the_cpu_or_are_bad_on_both(dali: Decoder, cpu: Decoder, path: Path) -> None:
    if path.stem == "lossless":
        pytest.skip("see the docstring of pipeline.decode")
    images, boxes, flips = [path.read_bytes()], np.array([(5, 7, 30, 40)]), np.array([False])
    decoded, expected = dali(images, boxes, flips), cpu(images, boxes, flips)
    assert decoded.bad.keys() == expected.bad.keys()
    assert_same(decoded.images, expected.images)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(16, 700),
    height=st.integers(16, 700),
    mode=st.sampled_from(["RGB", "L"]),
    options=st.sampled_from(
        [
            {"subsampling": 0},
            {"subsampling": 1},
            {"subsampling": 2},
            {"progressive": True},
            {"optimize": True},
        ]
    ),
    data=st.data(),
)
def test_any_crop_of_any_jpeg_matches_the_cpu(
    dali: Decoder, cpu: Decoder, width: int, height: int, mode: str, options: dict, data: st.DataObject
) -> None:
    image = saved(picture(width, height).convert(mode), "JPEG", **{"quality": 90, **options})
    boxes: Boxes = []
    for _ in range(8):
        h, w = data.draw(st.integers(8, height)), data.draw(st.integers(8, width))
        boxes.append((data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w))
    flips = np.arange(8) % 2 == 0
    decoded = dali([image] * 8, np.array(boxes), flips)
    assert decoded.bad == {}
    assert_same(decoded.images, cpu([image] * 8, np.array(boxes), flips).images)


# ---- bad images -----------------------------------------------------------------------------------------------


def test_bad_images_are_reported_and_do_not_affect_the_others(dali: Decoder, cpu: Decoder) -> None:
    images, boxes, flips = scenes(16)
    expected = cpu(images, boxes, flips).images
    damaged = list(images)
    damaged[1] = images[1][:200]
    damaged[4] = b"this is no image"
    damaged[9] = b"\xff\xd8\xff\xe0" + b"nor is this" * 99
    for _ in range(2):  # and the decoder still works afterwards
        decoded = dali(damaged, boxes, flips)
        assert sorted(decoded.bad) == [1, 4, 9]
        assert all(decoded.bad.values())
        assert not decoded.images[[1, 4, 9]].any()
        good = [i for i in range(16) if i not in decoded.bad]
        assert_same(decoded.images[good], expected[good])
        assert_same(dali(images, boxes, flips).images, expected)


def test_a_truncated_image_is_bad(dali: Decoder) -> None:
    images, boxes, flips = scenes(4)
    boxes[2, 2] += boxes[2, 0]
    boxes[2, 0] = 0  # so that the crop starts at the first row
    images[2] = images[2][:1500]
    assert list(dali(images, boxes, flips).bad) == [2]


def test_a_batch_with_only_bad_images(dali: Decoder) -> None:
    decoded = dali([b"no image"] * 3, np.array([(0, 0, 9, 9)] * 3), np.zeros(3, bool))
    assert sorted(decoded.bad) == [0, 1, 2]
    assert decoded.images.shape == (3, 3, SIZE, SIZE)
    assert not decoded.images.any()


# ---- batches --------------------------------------------------------------------------------------------------


def make_loader(dataset: Dataset, decoder: Decoder) -> Loader:
    order = Order(dataset.shard_samples, seed=0, global_batch=32, lanes=8, block=16)
    return Loader(dataset, order, decoder, 0, 1)


def test_batches_match_the_cpus(dataset: Dataset, dali: Decoder, cpu: Decoder) -> None:
    steps = (make_loader(dataset, decoder).steps(0, 20) for decoder in (dali, cpu))
    for ours, expected in zip(*steps, strict=True):
        assert (ours.sample_ids == expected.sample_ids).all()
        assert (ours.labels == expected.labels).all()
        assert (ours.weights == expected.weights).all()
        assert_same(ours.images, expected.images)


def test_batches_made_ahead_are_not_overwritten(dataset: Dataset, dali: Decoder) -> None:
    """The trainer's stream may read a batch long after its thread has released it."""
    loader = make_loader(dataset, dali)
    expected = [loader.batch(step).images.cpu() for step in range(24)]
    behind = torch.cuda.Event()
    seen = []
    for batch in loader.steps(0, 24):
        if batch.step % 8 == 0:
            torch.cuda._sleep(2_000_000_000)  # about a second
            behind.record()
        seen.append(batch.images.clone())
        if batch.step % 8 == 5:
            assert not behind.query(), "the stream was not behind, so this test shows nothing"
    for images, right in zip(seen, expected, strict=True):
        assert_same(images, right)


def test_device_memory_does_not_grow(make_dali: MakeDecoder) -> None:
    images, boxes, flips = scenes(64)
    used = []
    with closing(make_dali()) as decoder:
        for step in range(200):
            # Different images in a batch, so that different buffers grow.
            turn = np.random.default_rng(step).permutation(64)
            decoder([images[i] for i in turn], boxes[turn], flips[turn])
            free, total = torch.cuda.mem_get_info(GPU)
            used.append(total - free)
    assert max(used[100:]) - max(used[20:100]) <= 8 << 20, used
