"""Exports: they import again bit for bit, and other programs compute the same outputs from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.training.label_runs import config_of
from tests.support.training.small_runs import train
from trainer.config.model_schema import ClassifierConfig, EncoderConfig, ModelConfig
from trainer.config.recipe import parse_config
from trainer.config.schema import LinprobeConfig
from trainer.models.classifier import Classifier, Encoder
from trainer.models.mae import MAE
from trainer.run.checkpoint import committed_steps, read_weights
from trainer.run.run import create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.train.finetune import finetune
from trainer.weights import model_card as card
from trainer.weights.export import export
from trainer.weights.pretrained import ModelInfo, PretrainedModel, encoder_only, read_pretrained
from trainer.weights.state_dicts import build_model

pytestmark = pytest.mark.integration

SMALL = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3}
MODEL = ModelConfig(**SMALL, decoder_width=16, decoder_depth=1, decoder_heads=2)
PIXELS = MODEL.model_copy(update={"norm_pix": False, "mask_ratio": 0.6})
NAMES = ["cat", "dog", "newt"]


def of(model: EncoderConfig, classes: int = len(NAMES)) -> PretrainedModel:
    """A model with random values in all weights, also in those that are initialised to constants."""
    torch.manual_seed(0)
    weights = {n: t + 0.05 * torch.randn_like(t) for n, t in build_model(model, classes).state_dict().items()}
    return PretrainedModel(
        ModelInfo("test", model, classes=NAMES if isinstance(model, ClassifierConfig) else None), weights
    )


def same(a: PretrainedModel, b: PretrainedModel) -> bool:
    assert a.model == b.model
    assert a.weights.keys() == b.weights.keys()
    return all(
        torch.equal(a.weights[n], b.weights[n]) and a.weights[n].dtype == b.weights[n].dtype
        for n in a.weights
    )


FILE = {"authors": "/model.pth"}


@pytest.mark.parametrize("form", ["safetensors", "transformers", "timm", "authors"])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(MODEL, id="mae"),
        pytest.param(PIXELS, id="mae of pixels"),
        pytest.param(EncoderConfig(**SMALL), id="encoder"),
        pytest.param(ClassifierConfig(**SMALL, pool="class"), id="class token"),
        pytest.param(ClassifierConfig(**SMALL, pool="mean"), id="mean of patches"),
        pytest.param(EncoderConfig(**{**SMALL, "image_size": (32, 48)}), id="not square"),
    ],
)
def test_round_trips_are_bit_exact(model: EncoderConfig, form: str, tmp_path: Path) -> None:
    found = of(model)
    out = str(tmp_path / "out")
    if form == "transformers" and getattr(model, "pool", "") == "mean":
        with pytest.raises(UserError, match="reads the mean of the patches"):
            export(found, form, open_store(out))
        assert not Path(out).exists()
        return
    export(found, form, open_store(out))
    back = read_pretrained(out + FILE.get(form, ""))
    if form == "timm" and isinstance(model, ModelConfig):
        found = encoder_only(found)
    if isinstance(model, ClassifierConfig):  # the drop path rate is not in the weights
        back = PretrainedModel(
            ModelInfo("", back.model.model_copy(update={"drop_path": model.drop_path})), back.weights
        )
    assert same(found, back)
    # the maestream format is bit-exact, too
    export(back, "safetensors", open_store(str(tmp_path / "again")))
    again = read_pretrained(str(tmp_path / "again"))
    assert same(back, again)


@settings(max_examples=12)
@given(
    shape=st.fixed_dictionaries(
        {
            "patch_size": st.integers(1, 5),
            "depth": st.integers(1, 3),
            "decoder_depth": st.integers(1, 2),
            "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
        }
    ),
    grid=st.integers(2, 4),
    form=st.sampled_from(["safetensors", "transformers", "authors"]),
)
def test_round_trips_of_any_shape_and_dtype_are_bit_exact(
    shape: dict[str, Any], grid: int, form: str, tmp_path_factory: Any
) -> None:
    dtype = shape.pop("dtype")
    model = ModelConfig(
        **shape, image_size=grid * shape["patch_size"], width=8, heads=2, decoder_width=12, decoder_heads=3
    )  # fmt: skip
    found = of(model)
    found = PretrainedModel(found.info, {name: tensor.to(dtype) for name, tensor in found.weights.items()})
    out = str(tmp_path_factory.mktemp("any"))
    export(found, form, open_store(out))
    assert same(found, read_pretrained(out + FILE.get(form, "")))


@pytest.mark.parametrize("model", [MODEL, PIXELS], ids=["normalised", "pixels"])
def test_transformers_computes_the_same_loss_and_reconstruction(model: ModelConfig, tmp_path: Path) -> None:
    found = of(model)
    export(found, "transformers", open_store(str(tmp_path)))
    theirs, loading = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert theirs.config.norm_pix_loss == model.norm_pix
    ours = MAE(model)
    ours.load_state_dict(found.weights)
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, model.num_patches)
    with torch.no_grad():
        expected = theirs(pixel_values=images, noise=noise)
        assert ours(images, noise).mean().item() == pytest.approx(expected.loss.item(), rel=1e-5)
        prediction = ours.predict(images, noise)[0]
    torch.testing.assert_close(prediction, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.unpatchify(prediction), theirs.unpatchify(expected.logits), rtol=1e-5, atol=1e-5
    )


def test_files_written_by_transformers_are_imported(tmp_path: Path) -> None:
    """With the parameter names of its newest version, and with those of its hub."""
    found = of(PIXELS)
    export(found, "transformers", open_store(str(tmp_path / "hub")))
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hub")
    theirs.save_pretrained(tmp_path / "saved")
    assert same(found, read_pretrained(str(tmp_path / "saved")))
    (tmp_path / "bin").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "bin/pytorch_model.bin")
    (tmp_path / "bin/config.json").write_text((tmp_path / "saved/config.json").read_text())
    assert same(found, read_pretrained(str(tmp_path / "bin")))


def test_transformers_computes_the_same_tokens_and_logits(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    encoder = encoder_only(of(MODEL))
    export(of(MODEL), "transformers", open_store(str(tmp_path / "encoder")), without_head=True)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
    ours = Encoder(encoder.model)
    ours.load_state_dict(encoder.weights)
    normalised = ours.normalise(images)
    with torch.no_grad():
        torch.testing.assert_close(theirs(normalised).last_hidden_state, ours(images), rtol=1e-5, atol=1e-5)

    found = of(ClassifierConfig(**SMALL, pool="class"))
    export(found, "transformers", open_store(str(tmp_path / "classifier")))
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "classifier")
    classifier = Classifier(found.model, 3)
    classifier.load_state_dict(found.weights)
    with torch.no_grad():
        torch.testing.assert_close(theirs(normalised).logits, classifier(images), rtol=1e-5, atol=1e-5)
    assert theirs.config.id2label[1] == "dog"
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "classifier", backend="pil")
    mine = processor(images[0], return_tensors="pt", do_resize=False)["pixel_values"]
    torch.testing.assert_close(mine[0], normalised[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model", [MODEL, ClassifierConfig(**SMALL, pool="mean")], ids=["encoder", "classifier"]
)
def test_exported_programs_compute_the_same_for_any_batch_size(model: EncoderConfig, tmp_path: Path) -> None:
    found = of(model)
    for form in ("onnx", "torch-export"):
        export(found, form, open_store(str(tmp_path / form)))
    whole = encoder_only(found) if isinstance(model, ModelConfig) else found
    ours = build_model(whole.model, len(NAMES))
    ours.load_state_dict(whole.weights)
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    program = torch.export.load(tmp_path / "torch-export/model.pt2").module()
    for batch in (1, 2, 5):
        images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            expected = ours(images)
            torch.testing.assert_close(program(images), expected, rtol=1e-5, atol=1e-5)
        (output,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(output, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_large_onnx_weights_are_written_to_a_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.weights.export.MAX_INLINE_BYTES", 1000)
    export(of(MODEL), "onnx", open_store(str(tmp_path)))
    assert (tmp_path / "model.onnx.data").stat().st_size > 1000
    images = np.zeros((1, 3, 32, 32), np.uint8)
    (output,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": images})
    assert output.shape == (1, 17, 24)


def test_weights_that_share_memory_are_exported_separately(tmp_path: Path) -> None:
    found = of(EncoderConfig(**SMALL))
    found.weights["blocks.0.norm1.bias"] = found.weights["blocks.1.norm1.bias"]
    export(found, "safetensors", open_store(str(tmp_path)))
    assert same(found, read_pretrained(str(tmp_path)))


def test_a_model_that_a_format_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    with pytest.raises(UserError, match="trained with masked patches as input"):
        export(of(MODEL.model_copy(update={"masked": "token"})), "authors", out)
    with pytest.raises(UserError, match="square images"):
        export(of(MODEL.model_copy(update={"image_size": (32, 48)})), "transformers", out)
    with pytest.raises(UserError, match="cannot be separated from the head"):
        export(of(ClassifierConfig(**SMALL, pool="mean")), "timm", out, without_head=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        export(of(MODEL), "timm", open_store(str(tmp_path / "full")))


def test_any_checkpoint_of_a_run_is_exported_with_a_card(scenes: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(scenes, out, epochs=2.0, checkpoint={"every_steps": 4, "keep": 9})
    steps = committed_steps(open_store(str(out)))
    assert len(steps) > 2
    found = read_pretrained(str(out), steps[0])
    export(found, "safetensors", open_store(str(tmp_path / "first")))
    weights = read_weights(open_store(str(out)), steps[0])
    back = read_pretrained(str(tmp_path / "first"))
    assert back.weights.keys() == weights.keys()
    assert all(torch.equal(back.weights[name], weights[name]) for name in weights)  # float64, unchanged
    card = (tmp_path / "first/README.md").read_text()
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[steps[0] - 1])
    assert f"training loss at the last step: {row['loss']:.4f}" in card
    for text in (
        "scenes, 70 samples, 7 classes",
        scenes.fingerprint,
        "torch 2.",
        "global_batch: 12",
        f"step {steps[0]}",
    ):
        assert text in card
    assert str(tmp_path) not in card
    with pytest.raises(UserError, match="committed steps: 4, 8"):
        read_pretrained(str(out), 5)


def test_a_card_has_names_but_no_folders() -> None:
    tree = {"init": "/home/me/base", "data": {"val": "s3://private/held-out"}}
    recipe = yaml.safe_load(card.recipe_yaml(parse_config(LinprobeConfig, tree, "test")))
    assert (recipe["init"]["run"], recipe["data"]["val"]) == ("…/base", "…/held-out")
    assert recipe["checkpoint"]["snapshots"] == "/dev/shm"  # the same on every machine


def test_a_fine_tuned_run_is_exported_with_averaged_weights_and_class_names(
    scenes: Dataset, tmp_path: Path
) -> None:
    config = config_of("finetune", "scratch", None, epochs=1.0, precision="float32")
    config, run = open_run(str(tmp_path / "run"), config, scenes)
    create_run(config, run, scenes)
    finetune(config, scenes, run, Worker(), Callbacks())
    found = read_pretrained(str(tmp_path / "run"))
    raw = read_weights(run.store, committed_steps(run.store)[-1])
    assert not torch.equal(found.weights["head.weight"], raw["head.weight"])
    export(found, "safetensors", open_store(str(tmp_path / "out")))
    back = read_pretrained(str(tmp_path / "out"))
    assert same(found, back)
    assert back.info.classes == scenes.manifest.classes
