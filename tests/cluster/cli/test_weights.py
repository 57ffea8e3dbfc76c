"""Import and export of weights on the command line; and the example of the documentation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from tests.support.command_line import printed, refused
from tests.support.datasets import build_dataset
from tests.support.documentation import blocks
from tests.support.paths import ROOT
from tests.support.training.published_mae import random_weights, shapes
from trainer.config.recipe import load_config, parse_config
from trainer.config.schema import LinprobeConfig, PretrainConfig
from trainer.run.run import create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.train.linprobe import linprobe
from trainer.train.pretrain import pretrain
from trainer.weights.init import resolve_init
from trainer.weights.pretrained import read_pretrained

pytestmark = pytest.mark.integration

SMALL = ("--heads", 3, "--decoder-heads", 2)


def weights(kind: str = "visualize") -> dict[str, torch.Tensor]:
    return random_weights(shapes(kind, 24, 2, 8, 32, d=16, d_depth=1))


@pytest.fixture(scope="module")
def run(scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "base"
    shape = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3}
    tree = {
        "epochs": 1, "global_batch": 12, "micro_batch": 4, "optim": {"warmup_epochs": 0}, "data": {"lanes": 4, "block": 8},
        "model": {**shape, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
    }  # fmt: skip
    config, opened = open_run(str(out), parse_config(PretrainConfig, tree, "test"), scenes)
    create_run(config, opened, scenes)
    pretrain(config, scenes, opened, Worker(), Callbacks())
    return out


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theirs") / "mae_visualize.pth"
    torch.save({"model": weights()}, path)
    return path


@pytest.fixture(scope="module")
def folder(theirs: Path) -> Path:
    """A folder written by `maestream import`."""
    out = theirs.parent / "imported"
    said = printed("import", theirs, out, *SMALL)
    assert "raw pixels are assumed" in said
    assert "mae with 2 blocks, width 24, 3 heads, patch size 8, image size 32 × 32" in said
    return out


def test_commands_accept_an_imported_model(folder: Path, scenes: Dataset, tmp_path: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    back = load_file(folder / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in weights().items())
    assert "sha256: " in (folder / "README.md").read_text()
    data = scenes.store.url
    said = printed("knn", folder, "--data", data, "--val", data, "--neighbours", 1, "--tasks", 1)
    assert "top-1 100.00 %" in said
    said = printed(
        "features", folder, "--data", data, "--out", tmp_path / "f", "--tasks", 1, "--image-size", 40
    )
    assert "features of 70 images" in said
    printed("export", folder, tmp_path / "again", "--format", "transformers")
    assert "cannot reconstruct" not in printed(
        "reconstruct", folder, "--data", data, "--grid", tmp_path / "grid.png"
    )
    assert "has no checkpoints" in refused("export", folder, tmp_path / "no", "--format", "timm", "--step", 3)
    assert "is not empty" in refused("import", folder, folder)
    assert "without class names" in refused("evaluate", folder, "--data", data)


def test_positions_are_interpolated_on_import(theirs: Path, tmp_path: Path) -> None:
    printed("import", theirs, tmp_path / "large", *SMALL, "--image-size", "48x64", "--targets", "normalised")
    config = json.loads((tmp_path / "large/config.json").read_text())["model"]
    assert (config["image_size"], config["norm_pix"]) == ([48, 64], True)
    assert load_file(tmp_path / "large/model.safetensors")["pos_embed"].shape == (1, 49, 24)
    assert "not divisible by patch_size 8" in refused(
        "import", theirs, tmp_path / "x", *SMALL, "--image-size", 50
    )
    assert not (tmp_path / "x").exists()


def test_a_recipe_starts_from_published_weights(theirs: Path, scenes: Dataset, tmp_path: Path) -> None:
    """From the weights file, without an import."""
    recipe = tmp_path / "recipe.yaml"
    shape = "{image_size: 48, patch_size: 8, width: 24, depth: 2, heads: 3}"
    recipe.write_text(
        f"init: {theirs}\nepochs: 0.2\nglobal_batch: 12\nmicro_batch: 4\nmodel: {shape}\n"
        "optim: {warmup_epochs: 0.1}\ndata: {lanes: 4, block: 8}\n"
    )

    def probe(out: Path, *overrides: str) -> None:
        config = resolve_init(load_config(LinprobeConfig, recipe, overrides))
        config, opened = open_run(str(out), config, scenes)
        create_run(config, opened, scenes)
        assert linprobe(config, scenes, opened, Worker(), Callbacks())

    probe(tmp_path / "run")
    after = read_pretrained(str(tmp_path / "run")).weights  # the encoder is frozen
    assert torch.equal(after["blocks.1.mlp.fc2.weight"], weights()["blocks.1.mlp.fc2.weight"])
    assert after["pos_embed"].shape == (1, 37, 24)
    assert f"run: {theirs}" in (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(UserError, match="its patch size is 8, not 16"):
        probe(tmp_path / "other", "model.patch_size=16")
    secret = "https://me:hush@example.org/w.pth"
    begin = ("linprobe", "--config", recipe, "--data", scenes.store.url, "--out", tmp_path / "no", "--init")
    said = refused(*begin, secret)
    assert "the config is stored in the run folder" in said
    assert "hush" not in said
    assert "is not a run, a model folder or a weight file" in refused(*begin, tmp_path / "nothing.pth")


def test_reconstruct_images_of_a_folder(run: Path, theirs: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), np.uint8)).save(
            images / f"{i}.png"
        )
    (images / "damaged.jpg").write_bytes(b"\xff\xd8\xff no")
    said = printed("reconstruct", theirs, "--images", images, "--grid", tmp_path / "a.png", *SMALL)
    assert "error over masked patches" in said
    assert "(5 images)" in said
    grids = []
    for statistics in ("original", "visible"):
        grid = tmp_path / f"{statistics}.png"
        said = printed("reconstruct", run, "--images", images, "--grid", grid, "--statistics", statistics)
        assert "error over masked normalised patches" in said
        grids.append(grid.read_bytes())
    assert grids[0] != grids[1]
    encoder = tmp_path / "encoder"
    printed("export", run, encoder, "--format", "safetensors", "--encoder")
    asked = ("reconstruct", encoder, "--grid", tmp_path / "no.png")
    assert "cannot reconstruct images: it is weights without a decoder" in refused(*asked, "--images", images)
    assert "give either --data DATASET or --images FOLDER" in refused(*asked)
    assert "has no images" in refused("reconstruct", run, "--grid", tmp_path / "no.png", "--images", encoder)


def test_a_malicious_file_is_one_line(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return Path.mkdir, (tmp_path / "ran",)

    torch.save({"model": Code()}, tmp_path / "mae_pretrain_vit_base.pth")
    for command in (
        ("import", tmp_path / "mae_pretrain_vit_base.pth", tmp_path / "out"),
        (
            "reconstruct",
            tmp_path / "mae_pretrain_vit_base.pth",
            "--images",
            tmp_path,
            "--grid",
            tmp_path / "g.png",
        ),
    ):
        assert "no code in it was run" in refused(*command)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_an_imported_classifier_can_be_evaluated(tmp_path: Path) -> None:
    data = build_dataset("synthetic:?count=12&classes=7", str(tmp_path / "data"))
    found = weights("finetuned")
    found |= {"head.weight": found["head.weight"][:7], "head.bias": found["head.bias"][:7]}
    save_file(found, tmp_path / "w")
    printed("import", tmp_path / "w", tmp_path / "model", "--heads", 3)
    assert "12 images, 0 of them bad" in printed(
        "evaluate", tmp_path / "model", "--data", data.store.url, "--tasks", 1
    )


def test_import_and_export_with_a_bucket(s3: str, folder: Path, tmp_path: Path) -> None:
    printed("import", folder, f"{s3}/weights/imported")
    printed("export", f"{s3}/weights/imported", f"{s3}/weights/authors", "--format", "authors")
    printed("import", f"{s3}/weights/authors/model.pth", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in weights().items())


def test_three_lines_of_the_documentation(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/guides/weights.md, "Use the encoder in three lines"."""
    page = "docs/guides/weights.md"
    code = blocks(page, "python")[-1]
    assert len([line for line in code.splitlines() if line]) == 3
    export = re.search(
        r"maestream export runs/base (\S+) --format transformers --encoder", (ROOT / page).read_text()
    )
    assert export is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/base").symlink_to(run)
    printed("export", "runs/base", export[1], "--format", "transformers", "--encoder")
    names = {"images": torch.randn(2, 3, 32, 32)}
    exec(code, names)
    assert names["features"].shape == (2, 17, 24)


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, cluster.cli.main; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
