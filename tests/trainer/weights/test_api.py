"""The public Python API, and the code on model cards."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maestream
from maestream import UserError, load_classifier, load_encoder, load_mae, read_model_info
from pipeline.dataset.dataset import Dataset
from pipeline.storage.store import open_store
from tests.support.documentation import blocks
from tests.support.paths import ROOT
from tests.support.training.label_runs import config_of
from trainer.config.model_schema import ClassifierConfig, EncoderConfig, ModelConfig
from trainer.models.vit import MEAN, STD
from trainer.run.run import create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.train.linprobe import linprobe
from trainer.weights.export import export
from trainer.weights.pretrained import ModelInfo, PretrainedModel, build_pretrained
from trainer.weights.state_dicts import build_model

SHAPE = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 1, "heads": 3}
CONFIGS: dict[str, EncoderConfig] = {
    "encoder": EncoderConfig(**SHAPE),
    "mae": ModelConfig(**SHAPE, decoder_width=16, decoder_depth=1, decoder_heads=2),
    "classifier": ClassifierConfig(**SHAPE, pool="class"),
}
NAMES = ["cat", "dog", "newt"]
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pretrained(kind: str) -> PretrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[kind]
    info = ModelInfo("test", config, classes=NAMES if kind == "classifier" else None)
    weights = build_model(config, len(NAMES)).state_dict()
    return PretrainedModel(info, {name: t + 0.05 * torch.randn_like(t) for name, t in weights.items()})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A maestream model folder of each kind."""
    out = {kind: str(tmp_path_factory.mktemp("models") / kind) for kind in CONFIGS}
    for kind, folder in out.items():
        export(pretrained(kind), "safetensors", open_store(folder))
    return out


def test_each_function_loads_its_kind_of_model(folders: dict[str, str]) -> None:
    with torch.no_grad():
        encoder = load_encoder(folders["encoder"])
        assert not encoder.training
        assert torch.equal(encoder(IMAGES), build_pretrained(pretrained("encoder"))(IMAGES))
        assert load_encoder(folders["mae"])(IMAGES).shape == (2, 17, 24)
        noise = torch.rand(2, 16)
        mae = load_mae(folders["mae"])
        assert torch.equal(mae(IMAGES, noise), build_pretrained(pretrained("mae"))(IMAGES, noise))
        logits = load_classifier(folders["classifier"])(IMAGES)
        assert torch.equal(logits, build_pretrained(pretrained("classifier"))(IMAGES))
    assert read_model_info(folders["classifier"]).classes == NAMES


def test_a_model_of_another_kind_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match="is not a masked autoencoder: it has no decoder"):
        load_mae(folders["encoder"])
    with pytest.raises(UserError, match="is not a classifier: it has no head"):
        load_classifier(folders["mae"])
    with pytest.raises(UserError, match="is not a run, a model folder or a weight file"):
        load_encoder(folders["mae"] + "-none")


def test_images_of_another_dtype_or_size_are_refused(folders: dict[str, str]) -> None:
    encoder, classifier = load_encoder(folders["encoder"]), load_classifier(folders["classifier"])
    mae = load_mae(folders["mae"])
    with pytest.raises(ValueError, match=r"must be uint8\[n, 3, 32, 32\]; got float32\[2, 3, 32, 32\]"):
        encoder(IMAGES / 255)
    classifier(encoder.normalise(IMAGES))  # takes normalised floats, too
    for model, more in ((encoder, ()), (classifier, ()), (mae, (torch.rand(2, 16),))):
        for images in (IMAGES[..., :24], IMAGES[0], IMAGES[:, :1], IMAGES.long()):
            with pytest.raises(ValueError, match=r"images must be uint8\[n, 3, 32, 32\]"):
                model(images, *more)
    with pytest.raises(ValueError, match="images must be"):
        classifier(images=IMAGES[0])


def test_a_linear_probe_is_loaded_with_its_head(scenes: Dataset, tmp_path: Path) -> None:
    config = config_of("linprobe", "scratch", None, epochs=0.5, precision="float32")
    config, run = open_run(str(tmp_path / "run"), config, scenes)
    create_run(config, run, scenes)
    linprobe(config, scenes, run, Worker(), Callbacks())
    probe = load_classifier(str(tmp_path / "run"))
    height, width = config.model.size
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    assert probe(images).shape == (2, len(scenes.manifest.classes))
    assert not probe.training
    with pytest.raises(ValueError, match="images must be uint8"):
        probe(images / 255)


def test_only_public_names_are_attributes_of_the_module() -> None:
    for name in maestream.__all__:
        assert callable(getattr(maestream, name))
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        _ = maestream.load_decoder


def test_the_code_of_the_documentation_runs(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "docs/guides/weights.md"
    code = blocks(page, "python")[0]
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/base").symlink_to(folders["mae"])
    Path("runs/base-ft").symlink_to(folders["classifier"])
    variables = {"images": IMAGES}
    exec(code, variables)
    assert (variables["tokens"].shape, variables["logits"].shape) == ((2, 17, 24), (2, len(NAMES)))
    for name in re.findall(r"^\| `(\w+)\(", (ROOT / page).read_text(), re.MULTILINE):
        assert name in maestream.__all__


def card_code(folder: Path) -> str:
    """Return the Python code of an export's model card, with the folder filled in."""
    code = re.search(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    return code[1].replace("FOLDER", str(folder))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "export_format", ["safetensors", "transformers", "timm", "authors", "onnx", "torch-export"]
)
def test_the_code_on_a_model_card_runs(export_format: str, kind: str, tmp_path: Path) -> None:
    if export_format == "timm":
        pytest.importorskip("timm", exc_type=Exception)
    export(pretrained(kind), export_format, open_store(str(tmp_path)))
    card = (tmp_path / "README.md").read_text()
    normalised = "scaled to [0, 1], minus the mean" in card
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    images: Any = (IMAGES / 255 - mean) / std if normalised else IMAGES
    model = build_model(CONFIGS[kind], len(NAMES))  # has the authors' parameter names
    variables = {"images": images.numpy() if export_format == "onnx" else images, "model": model}
    with torch.no_grad():
        exec(card_code(tmp_path), variables)
        expected = pretrained(kind)
        if export_format == "authors":
            assert all(torch.equal(tensor, expected.weights[n]) for n, tensor in model.state_dict().items())
            return
        if kind == "classifier":
            logits = variables.get("logits")
            if logits is None:
                output = variables["output"]
                logits = output if export_format == "timm" else output.logits
            ours = build_pretrained(expected)(IMAGES)
            np.testing.assert_allclose(np.asarray(logits), ours.numpy(), rtol=1e-4, atol=1e-4)
        elif "tokens" in variables:
            assert tuple(variables["tokens"].shape) == (2, 17, 24)
