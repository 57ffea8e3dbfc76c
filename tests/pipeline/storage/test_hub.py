"""hf:// against a stand-in for the hub: sources, datasets and their errors."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.index import find_shards, index_shards
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.command_line import refused
from tests.support.data.loaders import make_loader
from tests.support.datasets import build_dataset
from tests.support.hub import Hub, hub

pytestmark = pytest.mark.integration
URL = "hf://datasets/me/photos"


@pytest.fixture(scope="module")
def folders(scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with class folders, a Parquet file, tars and a dataset."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(scenes.store.root, root / "scenes")
    for shard in range(len(scenes.shard_samples)):
        name = scenes.shard_name(shard)
        (root / "tars").mkdir(exist_ok=True)
        shutil.copy(scenes.shard_store.path(name), root / "tars" / name)
    rows = scenes.read_index_table(0).slice(0, 6)
    tar = scenes.shard_store.read(scenes.shard_name(0))
    images = [tar[o : o + s] for o, s in zip(*(rows[c].to_pylist() for c in ("offset", "size")), strict=True)]
    for number, image in enumerate(images):
        path = root / "folders" / ("cat" if number % 2 else "dog") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    (root / "data").mkdir()
    for part in range(2):
        own = images[part::2]
        table = pa.table({"image": [{"bytes": i, "path": None} for i in own], "label": list(range(len(own)))})
        pq.write_table(table, root / "data" / f"train-{part}.parquet")
    return root


@pytest.fixture
def known(folders: Path) -> Iterator[Hub]:
    with hub(folders, "me/photos") as known:
        yield known


@pytest.mark.parametrize(
    ("source", "samples"),
    [("folders", 6), ("data/train-*.parquet", 6), ("data/train-1.parquet", 3), ("tars", 70), ("scenes", 70)],
)
def test_a_dataset_is_built_from_a_repository(
    known: Hub, folders: Path, source: str, samples: int, tmp_path: Path
) -> None:
    """The same as from a folder; small ranges are read as such."""
    there = build_dataset(f"{URL}/{source}", str(tmp_path / "there"))
    here = build_dataset(str(folders / source), str(tmp_path / "here"))
    assert there.samples == samples
    assert there.fingerprint == here.fingerprint
    largest = max(path.stat().st_size for path in folders.rglob("*") if path.is_file())
    assert known.ranges
    assert max(last - first for first, last in known.ranges) < largest


def test_tars_are_indexed_elsewhere_and_trained_on(
    known: Hub, scenes: Dataset, folders: Path, tmp_path: Path
) -> None:
    store = open_store(f"{URL}@main/tars")
    with pytest.raises(UserError, match=r"can be read, but not written.*add --to"):
        index_shards(store, find_shards(store), store)
    index_shards(store, find_shards(store), open_store(str(tmp_path)), checksums=True)
    dataset = open_dataset(str(tmp_path))
    assert verify(dataset) == []
    for here, there in zip(make_loader(scenes).steps(0, 3), make_loader(dataset).steps(0, 3), strict=True):
        assert torch.equal(here.images, there.images)


def test_a_dataset_is_read_where_it_is(known: Hub, scenes: Dataset) -> None:
    dataset = open_dataset(f"{URL}/scenes")
    for here, there in zip(make_loader(scenes).steps(0, 3), make_loader(dataset).steps(0, 3), strict=True):
        assert torch.equal(here.images, there.images)


def test_a_private_repository_needs_a_token_which_appears_nowhere(
    known: Hub, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known.required_token = "hf_secret_token"
    message = refused("shards", "build", f"{URL}/folders", tmp_path / "x")
    assert "the repository or its revision does not exist, or is private or gated. Log in" in message
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    with hub(folders, "me/photos") as known:
        known.required_token = "hf_secret_token"
        dataset = build_dataset(f"{URL}/folders", str(tmp_path / "x"))
    assert dataset.samples == 6
    assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hf://datasets/me/other", "private or gated"),
        ("hf://datasets/me/photos@v2", "private or gated"),
        ("hf://datasets/me", "Repository id must be"),
        (f"{URL}/nothing", "no such file or folder"),
        (f"{URL}/data/*.tar", "no file matches this pattern"),
    ],
)
def test_wrong_names_are_one_message(known: Hub, url: str, words: str, tmp_path: Path) -> None:
    assert words in refused("shards", "build", url, tmp_path / "x")


def test_a_busy_hub_is_asked_again(known: Hub) -> None:
    known.failures = 1
    assert open_store(f"{URL}/folders/dog").read("0.jpg")
