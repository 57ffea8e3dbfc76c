"""Pictures of images with other channels and depths than 8-bit RGB."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.statistics import Statistics, write_statistics
from pipeline.errors import UserError
from pipeline.pictures.bands import draw_bands, picture_bands
from pipeline.pictures.contact_sheet import draw_contact_sheet
from tests.support.datasets import build_dataset


def test_bands_are_chosen_and_checked() -> None:
    assert picture_bands(12) == [0, 1, 2]
    assert picture_bands(12, (4, 3, 2)) == [3, 2, 1]
    assert picture_bands(12, (7,)) == [6, 6, 6]
    assert picture_bands(1) == picture_bands(2) == [0, 0, 0]
    for bands, message in (
        ((0, 1, 2), "no band 0"),
        ((1, 2, 13), "no band 13"),
        ((1, 2), "expected 3 bands"),
    ):
        with pytest.raises(UserError, match=message):
            picture_bands(12, bands)


def test_contrast_is_two_standard_deviations_around_the_mean() -> None:
    mean, std = torch.tensor([5.0, 100.0, 7.0]), torch.tensor([1.0, 10.0, 0.0])
    image = torch.tensor([[80.0, 100.0, 120.0, 300.0, float("nan")]] * 3).view(1, 3, 1, 5)
    drawn = draw_bands(image, [1, 1, 1], (mean, std))
    assert drawn[0, 0, 0].tolist() == [0, 128, 255, 255, 0]
    grey = torch.arange(256).view(1, 1, 16, 16).to(torch.uint8)
    assert torch.equal(draw_bands(grey.float() / 255, [0, 0, 0], None), grey.expand(-1, 3, -1, -1))


def dataset_of(folder: Path, images: list[np.ndarray]) -> Dataset:
    (folder / "tiffs/a").mkdir(parents=True)
    for number, image in enumerate(images):
        tifffile.imwrite(
            folder / f"tiffs/a/{number}.tif", image, photometric="minisblack", planarconfig="contig"
        )
    return build_dataset(str(folder / "tiffs"), str(folder / "shards"))


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_contact_sheet_shows_deep_bands_with_contrast(dtype: str, tmp_path: Path) -> None:
    ramp = np.linspace(2000, 2100, 120)[:, None, None] + np.zeros((120, 120, 5))
    ramp[..., 1] = 2050  # constant: grey
    dataset = dataset_of(tmp_path, [ramp.astype(dtype)] * 3)
    assert dataset.manifest.pixels.channels == 5
    without = np.asarray(Image.open(io.BytesIO(draw_contact_sheet(dataset))))[8:112, 20:100]
    assert without[..., 0].min() < 40
    assert without[..., 0].max() > 215
    assert (np.abs(without[..., 1].astype(int) - 128) <= 1).all()
    scale = 65535 if dtype == "uint16" else 1
    statistics = Statistics(
        fingerprint=dataset.fingerprint, dtype=dtype, mean=(2050 / scale,) * 5, std=(1000 / scale,) * 5, grey=None,
        images=3, pixels=9, samples=None, seed=None,
    )  # fmt: skip
    write_statistics(dataset, statistics)
    flat = np.asarray(Image.open(io.BytesIO(draw_contact_sheet(dataset))))[8:112, 20:100]
    assert 120 < flat.min() <= flat.max() < 136


def test_a_contact_sheet_shows_8_bit_bands_as_they_are(tmp_path: Path) -> None:
    image = np.zeros((120, 120, 4), np.uint8)
    image[..., :3] = (200, 100, 50)
    dataset = dataset_of(tmp_path, [image])
    assert (dataset.manifest.pixels.channels, dataset.manifest.pixels.dtype) == (4, "uint8")
    sheet = np.asarray(Image.open(io.BytesIO(draw_contact_sheet(dataset))))
    assert sheet[60, 60].tolist() == [200, 100, 50]
