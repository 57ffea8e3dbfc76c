"""A user's `trainer.py`, `pipeline.py` or `cluster/` never replaces maestream's package; where it would, it is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.deploy.submit import staged
from maestream import hiding_module
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.paths import ROOT
from trainer.run.metrics import read_metrics

pytestmark = pytest.mark.integration

BOMB = "raise SystemExit('the module of the user was imported')\n"
TINY = (
    "global_batch=8", "epochs=1", "precision=float32", "log_every=1", "checkpoint.snapshots=null", "optim.warmup_epochs=0",
    "model.image_size=32", "model.patch_size=8", "model.width=24", "model.depth=1", "model.heads=3",
    "model.decoder_width=16", "model.decoder_depth=1", "model.decoder_heads=2", "data.decoder=cpu",
)  # fmt: skip


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A git checkout of a user, with modules that have the names of our packages."""
    folder = tmp_path / "project"
    (folder / "cluster").mkdir(parents=True)
    for name in ("trainer.py", "pipeline.py", "cluster/__init__.py"):
        (folder / name).write_text(BOMB)
    (folder / "recipe.yaml").write_text("task: pretrain\n")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def run_there(folder: Path, *words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [str(Path(sys.executable).with_name("maestream")), *map(str, words)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["trainer.py", "pipeline/__init__.py", "cluster.py"])
def test_submit_refuses_a_folder_that_would_hide_our_packages(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"would hide maestream's package"), staged(tmp_path):
        pass


def test_submit_takes_folders_that_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()  # no __init__.py: Python prefers our package
    (tmp_path / "trainer/notes.txt").write_text("")
    (tmp_path / "trainer_of_mine.py").write_text("")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    with staged(tmp_path) as copy:
        assert (copy / "trainer/notes.txt").exists()
    with staged(ROOT) as copy:  # our own checkout has the packages themselves
        assert (copy / "trainer/__init__.py").exists()


def test_submit_from_such_a_folder_is_one_line(user_folder: Path) -> None:
    done = run_there(
        user_folder, "submit", "--address", "http://localhost:1", "--", "pretrain", "--config", "recipe.yaml",
        "--data", "s3://bucket/data", "--out", "s3://bucket/run",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = done.stderr.strip().splitlines()
    assert "would hide maestream's package" in line
    assert "rename it" in line


def test_a_module_on_pythonpath_that_hides_a_package_is_one_line(user_folder: Path) -> None:
    assert hiding_module() is None
    path = os.pathsep.join([str(user_folder), str(ROOT)])
    done = run_there(ROOT, "--help", PYTHONPATH=path)
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = done.stderr.strip().splitlines()
    assert "hides maestream's package" in line
    assert str(user_folder) in line


def test_pretrain_works_from_a_folder_with_modules_of_the_same_names(user_folder: Path) -> None:
    built = run_there(user_folder, "shards", "build", "synthetic:?count=16&classes=2", "data")
    assert built.returncode == 0, built.stdout + built.stderr
    trained = run_there(
        user_folder, "pretrain", "--config", "recipe.yaml", "--data", "data", "--out", "run", *TINY
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert len(read_metrics(open_store(str(user_folder / "run")))) == 2
