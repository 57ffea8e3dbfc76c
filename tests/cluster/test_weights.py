"""Weights in, weights out, as people type it; and the README's lines, as they stand there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from authors import random_weights, shapes
from conftest import ROOT, build_dataset, printed, refused
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.manifest import Dataset
from trainer.config import LinprobeConfig, PretrainConfig
from trainer.initial import fix_init
from trainer.linprobe import linprobe
from trainer.pretrain import pretrain
from trainer.pretrained import read_pretrained
from trainer.recipe import load_config, parse_config
from trainer.run import found_run, open_run

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
    found_run(config, opened, scenes)
    pretrain(config, scenes, opened)
    return out


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theirs") / "mae_visualize.pth"
    torch.save({"model": weights()}, path)
    return path


@pytest.fixture(scope="module")
def folder(theirs: Path) -> Path:
    """What `maestream import` makes of a file."""
    out = theirs.parent / "imported"
    said = printed("import", theirs, out, *SMALL)
    assert "targets are taken to be plain pixels" in said
    assert "mae of 2 blocks, width 24, 3 heads, patches of 8, images of 32 × 32" in said
    return out


def test_an_import_is_a_folder_that_commands_take_like_a_run(
    folder: Path, scenes: Dataset, tmp_path: Path
) -> None:
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
    assert "reconstructs" not in printed(
        "reconstruct", folder, "--data", data, "--grid", tmp_path / "grid.png"
    )
    assert "it has no steps" in refused("export", folder, tmp_path / "no", "--format", "timm", "--step", 3)
    assert "is not empty" in refused("import", folder, folder)
    assert "names no classes" in refused("evaluate", folder, "--data", data)


def test_positions_are_interpolated_on_import(theirs: Path, tmp_path: Path) -> None:
    printed("import", theirs, tmp_path / "large", *SMALL, "--image-size", "48x64", "--targets", "normalised")
    config = json.loads((tmp_path / "large/config.json").read_text())["model"]
    assert (config["image_size"], config["norm_pix"]) == ([48, 64], True)
    assert load_file(tmp_path / "large/model.safetensors")["pos_embed"].shape == (1, 49, 24)
    assert "not divisible by patch_size 8" in refused(
        "import", theirs, tmp_path / "x", *SMALL, "--image-size", 50
    )
    assert not (tmp_path / "x").exists()


def test_a_recipe_begins_with_others_weights(theirs: Path, scenes: Dataset, tmp_path: Path) -> None:
    """With the file itself, without an import."""
    recipe = tmp_path / "recipe.yaml"
    shape = "{image_size: 48, patch_size: 8, width: 24, depth: 2, heads: 3}"
    recipe.write_text(
        f"init: {theirs}\nepochs: 0.2\nglobal_batch: 12\nmicro_batch: 4\nmodel: {shape}\n"
        "optim: {warmup_epochs: 0.1}\ndata: {lanes: 4, block: 8}\n"
    )

    def probe(out: Path, *overrides: str) -> None:
        config = fix_init(load_config(LinprobeConfig, recipe, overrides))
        config, opened = open_run(str(out), config, scenes)
        found_run(config, opened, scenes)
        assert linprobe(config, scenes, opened)

    probe(tmp_path / "run")
    after = read_pretrained(str(tmp_path / "run")).weights  # a frozen encoder is what it was
    assert torch.equal(after["blocks.1.mlp.fc2.weight"], weights()["blocks.1.mlp.fc2.weight"])
    assert after["pos_embed"].shape == (1, 37, 24)
    assert f"run: {theirs}" in (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(UserError, match="its patches are 8 pixels wide, not 16"):
        probe(tmp_path / "other", "model.patch_size=16")
    secret = "https://me:hush@example.org/w.pth"
    begin = ("linprobe", "--config", recipe, "--data", scenes.store.url, "--out", tmp_path / "no", "--init")
    said = refused(*begin, secret)
    assert "does not belong in a config" in said
    assert "hush" not in said
    assert "is not a run, not a folder of a model" in refused(*begin, tmp_path / "nothing.pth")


def test_pictures_of_a_folder_of_images(run: Path, theirs: Path, tmp_path: Path) -> None:
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
    assert "weights without a decoder, which reconstructs nothing" in refused(*asked, "--images", images)
    assert "--data DATASET, or --images FOLDER" in refused(*asked)
    assert "there is no image" in refused(
        "reconstruct", run, "--grid", tmp_path / "no.png", "--images", encoder
    )


def test_a_hostile_file_is_one_message(tmp_path: Path) -> None:
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
        assert "nothing in it was run" in refused(*command)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_classifier_that_comes_in_is_evaluated(tmp_path: Path) -> None:
    data = build_dataset("synthetic:?count=12&classes=7", str(tmp_path / "data"))
    found = weights("finetuned")
    found |= {"head.weight": found["head.weight"][:7], "head.bias": found["head.bias"][:7]}
    save_file(found, tmp_path / "w")
    printed("import", tmp_path / "w", tmp_path / "model", "--heads", 3)
    assert "12 images, 0 of them bad" in printed(
        "evaluate", tmp_path / "model", "--data", data.store.url, "--tasks", 1
    )


def test_weights_lie_in_a_bucket(s3: str, folder: Path, tmp_path: Path) -> None:
    printed("import", folder, f"{s3}/weights/imported")
    printed("export", f"{s3}/weights/imported", f"{s3}/weights/authors", "--format", "authors")
    printed("import", f"{s3}/weights/authors/model.pth", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in weights().items())


def test_the_readmes_three_lines(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the encoder in three lines."""
    text = (ROOT / "README.md").read_text().partition("**Use the encoder in three lines**")[2]
    lines = re.search(r"\n\n((?:    .+\n)+)", text)
    assert lines is not None
    code = [line.strip() for line in lines[1].splitlines()]
    assert len(code) == 3
    export = re.search(r"maestream export runs/base (\S+) --format transformers --encoder", text)
    assert export is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/base").symlink_to(run)
    printed("export", "runs/base", export[1], "--format", "transformers", "--encoder")
    names = {"images": torch.randn(2, 3, 32, 32)}
    exec("\n".join(code), names)
    assert names["features"].shape == (2, 17, 24)


def test_a_command_that_is_refused_need_not_wait_for_torch() -> None:
    code = "import sys, cluster.cli; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
