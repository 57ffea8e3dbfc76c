"""Views: exact, nested, and the tars untouched."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.loading.readahead import read_samples
from pipeline.storage.store import open_store
from pipeline.views.view import Selection, ViewResult, make_view
from tests.support.data.fake_datasets import write_fake
from tests.support.datasets import build_dataset

CLASSES = ["cat", "dog", "owl"]


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def keys(dataset: Dataset) -> list[str]:
    return dataset.keys(np.arange(dataset.samples))


def view(source: Dataset, to: Path, overwrite: bool = False, **selection: Any) -> tuple[Dataset, ViewResult]:
    made = make_view(source, open_store(str(to)), Selection(**selection), overwrite)
    return open_dataset(str(to)), made


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """60 images of 3 classes in a few shards."""
    return build_dataset("synthetic:?count=60&classes=3", str(tmp_path_factory.mktemp("scenes")))


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """300 rows in 7 shards of different sizes."""
    rng, shards, nth = np.random.default_rng(0), [], 0
    for size in (1, 90, 40, 9, 100, 30, 30):
        rows = []
        for _ in range(size):
            score = None if nth % 5 == 0 else float(rng.random())
            label = int(rng.integers(-1, 2))  # no owl
            row = {"key": f"k/{nth:04d}", "label": label, "width": int(rng.integers(1, 500)), "score": score}
            rows.append(row)
            nth += 1
        shards.append(rows)
    return write_fake(tmp_path_factory.mktemp("fake"), shards, CLASSES)


def test_a_view_reads_the_same_images_and_leaves_the_tars_as_they_are(
    scenes: Dataset, tmp_path: Path
) -> None:
    before = digests(Path(scenes.store.root))
    name = scenes.manifest.classes[2]
    chosen, made = view(scenes, tmp_path / "view", where=f"label = '{name}' and width > height")
    located = scenes.locate(np.arange(60))
    expected = np.flatnonzero((located.label == 2) & (located.width > located.height))
    assert keys(chosen) == scenes.keys(expected)
    ours, theirs = read_samples(chosen, np.arange(chosen.samples)), read_samples(scenes, expected)
    assert [bytes(a) for a in ours.encoded] == [bytes(a) for a in theirs.encoded]
    assert set(ours.located.label) == {2}  # its number in the source
    assert chosen.manifest.classes == scenes.manifest.classes
    assert made.classes == 1
    assert verify(chosen) == []
    assert digests(Path(scenes.store.root)) == before
    written = sum(path.stat().st_size for path in (tmp_path / "view").rglob("*") if path.is_file())
    assert made.bytes == written < 40_000


def test_columns_and_missing_values(fake: Dataset, tmp_path: Path) -> None:
    located = fake.locate(np.arange(300))
    scored, _ = view(fake, tmp_path / "scored", where="score is not null and not label_number = 1")
    expected = (np.arange(300) % 5 != 0) & (located.label == 0)
    assert keys(scored) == fake.keys(np.flatnonzero(expected))  # rows without a label are not `not dog`
    shard, _ = view(fake, tmp_path / "shard", where="shard = 'shard-000003.tar' or key = 'k/0000'")
    assert shard.samples == 10
    assert shard.manifest.shards == 2
    again, _ = view(scored, tmp_path / "again", where="score > 0.5")  # kept columns stay
    assert 0 < again.samples < scored.samples
    assert again.manifest.shards_url == fake.store.url


def test_a_view_of_everything_is_the_same_dataset(fake: Dataset, tmp_path: Path) -> None:
    assert view(fake, tmp_path / "all")[0].fingerprint == fake.fingerprint


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 2**31 - 1), parts=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_fractions_are_exact_and_nested(
    fake: Dataset, tmp_path: Path, seed: int, parts: tuple[float, float]
) -> None:
    small, large = sorted(parts)
    chosen = [
        keys(view(fake, tmp_path / str(i), overwrite=True, fraction=part, seed=seed)[0])
        for i, part in enumerate((small, large))
    ]
    assert [len(found) for found in chosen] == [round(300 * small), round(300 * large)]
    assert set(chosen[0]) <= set(chosen[1])
    assert chosen[1] == sorted(chosen[1])  # the source's order


def test_a_fraction_is_the_same_in_any_order_of_shards_and_another_with_another_seed(tmp_path: Path) -> None:
    rows = [{"key": f"k{i}"} for i in range(400)]
    a = write_fake(tmp_path / "a", [rows[:150], rows[150:]], [])
    b = write_fake(tmp_path / "b", [rows[300:], rows[:300]], [])
    chosen = [set(keys(view(d, tmp_path / f"v{d.store.url[-1]}", fraction=0.3)[0])) for d in (a, b)]
    assert chosen[0] == chosen[1]
    other = set(keys(view(a, tmp_path / "other", fraction=0.3, seed=1)[0]))
    assert 20 < len(other & chosen[0]) < 55  # 36 are expected


def test_dropped_keys_are_not_there_and_unknown_ones_are_told(fake: Dataset, tmp_path: Path) -> None:
    drop = ["k/0007", "k/0299", "nobody", "k/0007"]
    left, made = view(fake, tmp_path / "left", drop=drop)
    assert left.samples == 298
    assert not {"k/0007", "k/0299"} & set(keys(left))
    assert made.unknown == ["nobody"]


def test_nothing_is_written_if_nothing_is_chosen(fake: Dataset, tmp_path: Path) -> None:
    for selection in ({"where": "width > 1000"}, {"fraction": 0.001}, {"where": "nonsense = 1"}):
        with pytest.raises(UserError, match=r"is selected|no column nonsense"):
            view(fake, tmp_path / "none", **selection)
    assert list(tmp_path.iterdir()) == []


def test_destinations_that_would_harm_a_dataset_are_refused(fake: Dataset, tmp_path: Path) -> None:
    source = Path(fake.store.root)
    for inside in (source, source / "view"):
        with pytest.raises(UserError, match="is the source, or in it: choose a destination outside"):
            view(fake, inside)
    built = write_fake(tmp_path / "built", [[{"key": "a"}]], [])
    with pytest.raises(UserError, match="already has a dataset: add --overwrite"):
        view(fake, tmp_path / "built")
    with pytest.raises(UserError, match="with tars of its own"):
        view(fake, tmp_path / "built", overwrite=True)
    assert open_dataset(built.store.url).samples == 1
    view(fake, tmp_path / "view")
    with pytest.raises(UserError, match="already has a dataset: add --overwrite"):
        view(fake, tmp_path / "view")
    smaller, _ = view(fake, tmp_path / "view", overwrite=True, where="shard = 'shard-000001.tar'")
    assert smaller.samples == 90
    assert [path.name for path in (tmp_path / "view" / "index").iterdir()] == ["shard-000001.parquet"]


def test_a_source_given_by_a_relative_path_is_found_from_anywhere(
    scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(scenes.store.root).parent)
    made = make_view(
        open_dataset(Path(scenes.store.root).name),
        open_store(str(tmp_path / "view")),
        Selection(fraction=0.5),
    )
    monkeypatch.chdir(tmp_path)
    assert made.manifest.shards_url == scenes.store.url
    assert len(read_samples(open_dataset("view"), np.arange(30)).encoded) == 30
    assert json.loads((tmp_path / "view" / "manifest.json").read_text())["built"]["fraction"] == 0.5
