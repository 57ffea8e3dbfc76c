"""A dataset of 12 bands and 16 bits from its TIFF files to a fine-tuned model and back, and the same at any world size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.statistics import read_statistics
from pipeline.decode.factory import make_decoder
from pipeline.storage.store import open_store
from tests.support.command_line import printed, refused
from tests.support.runs import losses
from tests.support.training.label_runs import KINDS, SHAPE
from tests.support.training.label_runs import config_of as labelled_config
from tests.support.training.small_runs import SMALL, config_of, spawn, weights
from trainer.config.schema import RunConfig
from trainer.evaluate.reconstruct import load_evenly_spaced
from trainer.models.pixels import images_taken
from trainer.run.run import create_run, open_run, read_config
from trainer.run.worker import Callbacks, Worker
from trainer.train.registry import TRAIN_FUNCTIONS
from trainer.weights.api import load_classifier, load_encoder
from trainer.weights.init import resolve_start
from trainer.weights.pretrained import read_pretrained

pytestmark = pytest.mark.integration

BANDS, COUNT, SIZE = 12, 60, (44, 40)


def band_images() -> np.ndarray:
    """uint16[60, 44, 40, 12]: values of 12 bits, each band of its own mean. The last bands of odd images have stripes."""
    rng = np.random.default_rng(0)
    images = rng.normal(np.linspace(300, 2500, BANDS), 120, (COUNT, *SIZE, BANDS))
    images[1::2, ::4, :, 6:] += 900
    return images.clip(0, 4095).astype(np.uint16)


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Built from TIFF files in class folders, with statistics."""
    folder = tmp_path_factory.mktemp("bands")
    for number, image in enumerate(band_images()):
        file = folder / "tiffs" / ("stripes" if number % 2 else "plain") / f"{number:03d}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(file, image, photometric="minisblack", planarconfig="contig", compression="zstd")
    printed("shards", "build", folder / "tiffs", folder / "shards", "--tasks", 1, "--bits", 12)
    said = printed("shards", "statistics", folder / "shards", "--tasks", 1)
    assert "all 60 images (uint16, " in said
    return open_dataset(str(folder / "shards"))


def run_of(config: RunConfig, dataset: Dataset, out: Path) -> RunConfig:
    """Train in this process, as the driver does on Ray. Returns the config that the run was given."""
    config, run = open_run(str(out), config, dataset)
    config = resolve_start(config, dataset)
    create_run(config, run, dataset)
    assert TRAIN_FUNCTIONS[config.task](config, dataset, run, Worker(), Callbacks())
    return config


def pretraining(**data: Any) -> RunConfig:
    return config_of(model={**SMALL["model"], "channels": BANDS}, data={**SMALL["data"], **data})


@pytest.fixture(scope="module")
def pretrained(bands: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    run_of(pretraining(), bands, out)
    return out


def test_the_dataset_has_its_bands_and_their_statistics(bands: Dataset) -> None:
    pixels = bands.manifest.pixels
    assert (pixels.channels, pixels.dtype, pixels.bits) == (12, "uint16", 12)
    found, values = read_statistics(bands), band_images().reshape(-1, BANDS).astype(np.float64) / 65535
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(found.std, values.std(axis=0), rtol=1e-10)
    assert found.grey is None
    batch = load_evenly_spaced(bands, make_decoder("cpu", 40, 1, pixels=pixels), 9)
    assert batch.images.dtype == torch.uint16
    assert batch.images.shape == (9, 12, 40, 40)


def test_pretraining_reconstruction_finetuning_and_export(
    bands: Dataset, pretrained: Path, tmp_path: Path
) -> None:
    url = bands.store.url
    assert len(losses(pretrained)) == 30
    assert losses(pretrained)[-1] < losses(pretrained)[0]
    config, found = read_config(open_store(str(pretrained))), read_statistics(bands)
    assert (config.data.normalise, config.model.pixel_dtype, config.model.pixel_bits) == (
        "dataset",
        "uint16",
        12,
    )
    assert (config.model.pixel_mean, config.model.pixel_std) == (found.mean, found.std)
    assert list((pretrained / "pictures").glob("*.png"))

    # ---- reconstruct
    pictures = {}
    for bands_option in ("3,2,1", "12,11,10", "7"):
        grid = tmp_path / f"{bands_option}.png"
        said = printed("reconstruct", pretrained, "--data", url, "--grid", grid, "--bands", bands_option)
        assert "normalise: 12-bit pixels / 65535 by mean 0." in said
        pictures[bands_option] = np.asarray(Image.open(grid))
    assert not np.array_equal(pictures["3,2,1"], pictures["12,11,10"])
    assert (np.ptp(pictures["7"].astype(int), axis=2) == 0).all()  # grey
    assert "there is no band 13: the images have 12 bands" in refused(
        "reconstruct", pretrained, "--data", url, "--grid", tmp_path / "no.png", "--bands", "1,2,13"
    )
    assert not (tmp_path / "no.png").exists()

    # ---- fine-tune
    model, mixing = {**KINDS["finetune"][2]["model"], "channels": BANDS}, {"magnitude": 0.0}
    tuned = labelled_config("finetune", str(pretrained), url, model=model, mixing=mixing)
    tuned = run_of(tuned, bands, tmp_path / "finetune")
    assert tuned.model.pixel_mean == config.model.pixel_mean
    assert np.isfinite(losses(tmp_path / "finetune")).all()
    assert "normalise: 12-bit" in printed("evaluate", tmp_path / "finetune", "--data", url, "--tasks", 1)
    assert "top-1" in printed("knn", pretrained, "--data", url, "--val", url, "--tasks", 1)

    # ---- export, and back
    images = load_evenly_spaced(bands, make_decoder("cpu", 32, 1, pixels=bands.manifest.pixels), 4).images
    printed("export", tmp_path / "finetune", tmp_path / "out", "--format", "safetensors")
    back, direct = load_classifier(str(tmp_path / "out")), load_classifier(str(tmp_path / "finetune"))
    assert torch.equal(back(images), direct(images))
    card = (tmp_path / "out/README.md").read_text()
    assert "uint16[n, 12, 32, 32]" in card
    assert "12 channels" in card
    for form in ("timm", "transformers"):
        printed("export", pretrained, tmp_path / form, "--format", form, "--encoder")
        encoder = read_pretrained(str(tmp_path / form))
        assert encoder.model.pixels == images_taken(config.model, bands.manifest.pixels)
        assert (encoder.model.pixel_mean, encoder.model.pixel_std) == (found.mean, found.std)
        printed("import", tmp_path / form, tmp_path / f"{form}-back")
        tokens = load_encoder(str(tmp_path / f"{form}-back"))(images)
        assert torch.equal(tokens, load_encoder(str(pretrained))(images))


def test_linear_probing(bands: Dataset, pretrained: Path, tmp_path: Path) -> None:
    tuned = labelled_config("linprobe", str(pretrained), None, model={**SHAPE, "channels": BANDS}, epochs=1.0)
    run_of(tuned, bands, tmp_path / "probe")
    assert np.isfinite(losses(tmp_path / "probe")).all()


def test_world_size_changes_no_loss_and_no_parameter(
    bands: Dataset, pretrained: Path, tmp_path: Path
) -> None:
    model = read_config(open_store(str(pretrained))).model.model_dump()
    changes = {"model": model, "data": {**SMALL["data"], "normalise": "dataset"}}
    spawn(2, bands.store.url, str(tmp_path / "many"), changes)
    assert losses(tmp_path / "many") == pytest.approx(losses(pretrained), rel=1e-9, abs=0)
    ours, theirs = weights(pretrained), weights(tmp_path / "many")
    for name, tensor in ours.items():
        assert torch.allclose(theirs[name], tensor, rtol=1e-7, atol=1e-9), name


def test_other_images_are_refused_by_name(
    bands: Dataset, pretrained: Path, scenes: Dataset, tmp_path: Path
) -> None:
    assert "the model takes 12 channels" in refused(
        "reconstruct", pretrained, "--data", scenes.store.url, "--grid", tmp_path / "x.png"
    )
    assert "the model takes 12 channels" in refused(
        "features", pretrained, "--data", scenes.store.url, "--out", tmp_path / "features"
    )
