"""Statistics of pixels: what numpy computes over all pixels at once, whatever the order in which tasks end."""

import io
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.statistics import STATISTICS, read_statistics
from pipeline.errors import UserError
from pipeline.loading import statistics
from pipeline.loading.readahead import read_samples
from pipeline.loading.statistics import FloatMoments, IntegerMoments, compute_statistics, sample_ids
from tests.support.command_line import printed
from tests.support.datasets import build_dataset


def pixels_of(dataset: Dataset, ids: Iterable[int] | None = None, mode: str = "RGB") -> np.ndarray:
    """All pixels of some images, float64[channels, n] in [0, 1]."""
    samples = read_samples(dataset, np.array(list(range(dataset.samples) if ids is None else ids)))
    images = [np.asarray(Image.open(io.BytesIO(data)).convert(mode)) for data in samples.encoded]
    return np.ascontiguousarray(np.concatenate([image.reshape(-1, len(mode)) for image in images]).T) / 255


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return build_dataset("synthetic:?count=20&classes=2", str(tmp_path_factory.mktemp("images")))


def test_statistics_are_those_of_all_pixels(images: Dataset) -> None:
    found = compute_statistics(images, None, 0).statistics
    pixels = pixels_of(images)
    assert found.pixels == pixels.shape[1]
    assert (found.images, found.samples, found.dtype) == (20, None, "uint8")
    np.testing.assert_allclose(found.mean, pixels.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(axis=1), rtol=1e-12)
    grey = pixels_of(images, mode="L")[0]
    np.testing.assert_allclose(found.grey, (grey.mean(), grey.std()), rtol=1e-12)


def test_jobs_may_end_in_any_order(images: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute_statistics(images, None, 0).statistics

    def shuffled(function: Callable[[Any], Any], inputs: Iterable[Any]) -> Iterator[Any]:
        results = [function(value) for value in inputs]
        random.Random(0).shuffle(results)
        return iter(results)

    monkeypatch.setattr(statistics, "JOB_SAMPLES", 3)
    monkeypatch.setattr(statistics, "READ_BYTES", 100_000)
    in_order = compute_statistics(images, None, 0).statistics
    assert compute_statistics(images, None, 0, shuffled).statistics == in_order
    # Sums of integers are exact: other jobs change nothing at all.
    assert (in_order.mean, in_order.std) == (whole.mean, whole.std)


def test_a_sample_is_seeded_and_nested(images: Dataset) -> None:
    few, more, other = sample_ids(1000, 10, 3), sample_ids(1000, 25, 3), sample_ids(1000, 10, 4)
    assert set(few) < set(more)
    assert set(few) != set(other)
    assert (np.diff(more) > 0).all()
    found = compute_statistics(images, 6, 3).statistics
    assert (found.images, found.samples, found.seed) == (6, 6, 3)
    np.testing.assert_allclose(found.mean, pixels_of(images, sample_ids(20, 6, 3)).mean(axis=1), rtol=1e-12)
    assert compute_statistics(images, 700, 3).statistics == compute_statistics(images, None, 0).statistics


def test_samples_are_chosen_alike_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample_ids(1000, 37, 1)
    monkeypatch.setattr(statistics, "HASHED", 64)
    assert (sample_ids(1000, 37, 1) == whole).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@given(data=st.data())
def test_moments_of_parts_are_those_of_all_values(dtype: type, data: st.DataObject) -> None:
    elements = st.floats(-1e6, 1e6, width=32) if dtype is np.float32 else None
    part = arrays.arrays(dtype, st.integers(0, 30), elements=elements)
    parts = data.draw(st.lists(part, min_size=1, max_size=5))
    moments: Any = FloatMoments() if dtype is np.float32 else IntegerMoments()
    for values in parts:
        own: Any = type(moments)()
        own.add_values(values)
        moments.add(own)
    values = np.concatenate(parts).astype(np.float64)
    assert moments.count == len(values)
    if len(values):
        expected = values.mean(), values.std()
        assert moments.mean_and_std() == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_values_far_from_zero_lose_no_digits() -> None:
    values = 1e8 + np.random.default_rng(0).normal(size=10_000)
    moments = FloatMoments()
    for part in np.split(values, 10):
        moments.add_values(part)
    assert moments.mean_and_std()[1] == pytest.approx(values.std(), rel=1e-9)


def test_the_command_writes_them_and_names_images_that_cannot_be_read(
    images: Dataset, tmp_path: Path
) -> None:
    copy = tmp_path / "scenes"
    shutil.copytree(images.store.root, copy)
    shard = copy / "shard-000000.tar"
    offset = int(images.locate([0]).offset[0])
    damaged = bytearray(shard.read_bytes())
    damaged[offset : offset + 40] = b"?" * 40
    shard.write_bytes(damaged)
    output = printed("shards", "statistics", copy, "--tasks", 1)
    assert f"skipped {images.keys([0])[0]}: its bytes changed" in output
    assert "mean and standard deviation of all 19 images (uint8, " in output
    found = read_statistics(open_dataset(str(copy)))
    np.testing.assert_allclose(found.mean, pixels_of(images, range(1, 20)).mean(axis=1), rtol=1e-12)
    assert f"{found.mean[2]:.5g}" in output
    assert open_dataset(str(copy)).fingerprint == images.fingerprint
    assert "a sample of 7 images" in printed("shards", "statistics", copy, "--tasks", 1, "--samples", 7)


def test_a_build_removes_the_statistics_of_what_it_replaces(tmp_path: Path) -> None:
    dest = str(tmp_path / "data")
    build_dataset("synthetic:?count=8&classes=2", dest)
    printed("shards", "statistics", dest, "--tasks", 1)
    assert (tmp_path / "data" / STATISTICS).exists()
    again = build_dataset("synthetic:?count=8&classes=2&seed=1", dest, overwrite=True)
    assert not (tmp_path / "data" / STATISTICS).exists()
    with pytest.raises(UserError, match="run `maestream shards statistics"):
        read_statistics(again)
