"""Mixes: every sample of every dataset, in one order, from where it lies."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cluster.cli.shards.group import shards
from pipeline.build.tar_source import dataset_source
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.repair import repair
from pipeline.dataset.verify import verify
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.loading.loader import Loader
from pipeline.loading.order import Schedule
from pipeline.loading.readahead import Reader, read_samples
from pipeline.storage.store import open_store
from pipeline.views.mix import MixResult, make_mix, parse_weight
from pipeline.views.view import Selection, make_view
from tests.pipeline.views.test_view import digests, keys, view
from tests.support.data.fake_datasets import write_fake
from tests.support.data.noise import write_noise
from tests.support.datasets import build_dataset
from trainer.config.schema import DataConfig, PretrainConfig
from trainer.run.run import make_order


def mix(
    sources: list[Dataset], to: Path, *weights: str, overwrite: bool = False
) -> tuple[Dataset, MixResult]:
    parsed = [parse_weight(text) for text in weights] or [Fraction(1)] * len(sources)
    made = make_mix(sources, parsed, open_store(str(to)), overwrite)
    return open_dataset(str(to)), made


def rows(*keys: str, **columns: Any) -> list[dict[str, Any]]:
    return [{"key": key, **columns} for key in keys]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """Two datasets with the same name, shard names and keys, but other images."""
    folder = tmp_path_factory.mktemp("scenes")
    return [
        build_dataset(f"synthetic:?count={n}&classes=3&seed={n}", str(folder / str(n) / "train"))
        for n in (12, 20)
    ]


def test_a_mix_has_the_images_of_all_and_leaves_the_tars_as_they_are(
    scenes: list[Dataset], tmp_path: Path
) -> None:
    before = [digests(Path(source.store.root)) for source in scenes]
    mixed, made = mix(scenes, tmp_path / "mix", "1", "0.5")
    assert mixed.samples == 32
    assert keys(mixed) == keys(scenes[0]) + keys(scenes[1])
    images = [bytes(i) for source in scenes for i in read_samples(source, np.arange(source.samples)).encoded]
    assert [bytes(image) for image in read_samples(mixed, np.arange(32)).encoded] == images
    assert [part.name for part in mixed.parts] == ["train", "train-2"]
    assert mixed.shard_name(0) == "train/shard-000000.tar"
    assert verify(mixed) == []
    assert made.renumbered == []
    assert made.bytes < 30_000
    assert [digests(Path(source.store.root)) for source in scenes] == before
    assert dataset_source(open_store(mixed.store.url)).items.num_rows == 32  # it can be built from


def test_damage_of_a_mix_is_found(scenes: list[Dataset], tmp_path: Path) -> None:
    mixed, _ = mix(scenes, tmp_path / "mix")
    next((tmp_path / "mix" / "index" / "train-2").iterdir()).unlink()
    (line,) = repair(mixed.store.url).unrepaired
    assert "train-2/shard-000000.parquet: missing; make it again with `maestream shards mix" in line


def test_each_epoch_reads_the_right_bytes(tmp_path: Path) -> None:
    sources = [write_noise(tmp_path / name, 2, 60, 3000 + i) for i, name in enumerate("ab")]
    mixed, _ = mix(sources, tmp_path / "mix", "1.5", "0.5")
    order = make_order(PretrainConfig(global_batch=24, data=DataConfig(lanes=6, block=16)), mixed)
    counts = np.zeros(mixed.samples, np.int64)
    reader = Reader(mixed, order, Schedule.constant(0, 1), 0, 2 * order.steps_per_epoch, 1 << 16)
    for step in range(2 * order.steps_per_epoch):
        samples = reader.read(step)
        assert samples.changed == []  # crc32c of each
        assert samples.ids.tolist() == order.step_ids(step).tolist()
        counts += np.bincount(samples.ids, minlength=mixed.samples)
    reader.close()
    assert counts[:120].sum() in range(360 - 48, 361)
    assert counts[:120].max() == 3
    assert counts[120:].max() == 1


def test_each_time_that_an_epoch_shows_a_sample_it_is_cropped_anew(
    scenes: list[Dataset], tmp_path: Path
) -> None:
    mixed, _ = mix(scenes[:1], tmp_path / "mix", "2")
    order = make_order(PretrainConfig(global_batch=24, data=DataConfig(lanes=1, block=24)), mixed)
    loader = Loader(mixed, order, make_decoder("cpu", 32, 1), 0, 1)
    batch = loader.batch(0)
    loader.close()
    assert sorted(batch.sample_ids.tolist()) == sorted([*range(12), *range(12)])
    for sample in range(12):
        first, second = batch.images[batch.sample_ids == sample]
        assert not torch.equal(first, second)


def test_weights_are_part_of_the_dataset_and_of_its_order_only_if_they_differ(tmp_path: Path) -> None:
    a, b = (write_fake(tmp_path / name, [rows(f"{name}1", f"{name}2")], []) for name in "ab")
    plain, _ = mix([a, b], tmp_path / "plain")
    assert make_order(PretrainConfig(global_batch=2, data=DataConfig(lanes=1, block=2)), plain).weights == ()
    other, _ = mix([a, b], tmp_path / "other", "1", "2")
    again, _ = mix([a, b], tmp_path / "again", "1.0", "4/2")
    assert plain.fingerprint != other.fingerprint == again.fingerprint
    assert plain.identity != other.identity


def test_classes_are_united_and_renumbered(tmp_path: Path) -> None:
    a = write_fake(tmp_path / "a", [[{"key": "k", "label": 1}, {"key": "n"}]], ["cat", "dog"])
    b = write_fake(tmp_path / "b", [rows("k", label=0) + rows("o", label=1)], ["dog", "owl"])
    c = write_fake(tmp_path / "c", [rows("u")], [])
    mixed, made = mix([a, b, c], tmp_path / "mix")
    assert mixed.manifest.classes == ["cat", "dog", "owl"]
    assert mixed.locate(np.arange(5)).label.tolist() == [1, -1, 1, 2, -1]
    assert made.renumbered == [b.store.url]
    chosen, _ = view(mixed, tmp_path / "dogs", where="label = 'dog' and shard like 'b/%'")
    assert keys(chosen) == ["k"]
    assert [part.name for part in chosen.parts] == ["b"]


def test_a_mix_of_a_mix_and_a_view_of_a_mix_keep_weights_and_places(tmp_path: Path) -> None:
    a, b, c = (write_fake(tmp_path / name, [rows(f"{name}1", f"{name}2")], []) for name in "abc")
    inner, _ = mix([a, b], tmp_path / "inner", "1", "0.5")
    outer, _ = mix([inner, c], tmp_path / "outer", "3", "1")
    assert [(part.name, part.weight, part.url) for part in outer.parts] == [
        ("inner.a", "3", a.store.url),
        ("inner.b", "3/2", b.store.url),
        ("c", "1", c.store.url),
    ]
    assert outer.shard_store.describe(outer.shard_name(1)) == f"{b.store.url}/shard-000000.tar"
    half, _ = view(outer, tmp_path / "half", where="key <> 'b1' and shard not like 'c/%'")
    assert [(part.name, part.shards, part.weight) for part in half.parts] == [
        ("inner.a", 1, "3"),
        ("inner.b", 1, "3/2"),
    ]
    assert half.samples == 3


def test_kept_columns_of_one_dataset_are_missing_in_the_others(tmp_path: Path) -> None:
    a = write_fake(tmp_path / "a", [rows("a", score=0.5, x="text")], [])
    b = write_fake(tmp_path / "b", [rows("b", x=1)], [])
    mixed, made = mix([a, b], tmp_path / "mix")
    assert made.lost == ["x"]
    assert keys(view(mixed, tmp_path / "scored", where="score > 0")[0]) == ["a"]
    assert keys(view(mixed, tmp_path / "other", where="score is null")[0]) == ["b"]


def test_what_cannot_be_mixed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    a = write_fake(tmp_path / "a", [rows("a", label=0)], ["x"])
    with pytest.raises(UserError, match="is the source, or in it"):
        mix([a], tmp_path / "a")
    for text in ("0", "-1", "nan", "1e-9", "1001", "half", "1/0"):
        with pytest.raises(UserError, match=f"weight {text}: expected a number"):
            parse_weight(text)
    make_view(a, open_store(str(tmp_path / "view")), Selection())
    with pytest.raises(UserError, match="already has a dataset: add --overwrite"):
        mix([a], tmp_path / "view")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "view"}


def test_weights_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write_fake(tmp_path / name, [rows(*(f"{name}{i}" for i in range(10)))], [])
    made = []
    for number, words in enumerate(
        (["--weights", "1", "0.5", "3"], ["--weights", "1,1/2,3"], ["--weights=1,.5,3"])
    ):
        result = CliRunner().invoke(shards, ["mix", "a", "b", "c", f"m{number}", *words])
        assert result.exit_code == 0, result.output
        assert "b: 10 samples × 1/2 = 5 per epoch, from" in result.output
        assert "45 samples per epoch" in result.output
        made.append(open_dataset(f"m{number}").fingerprint)
    assert len(set(made)) == 1
    first = CliRunner().invoke(shards, ["mix", "--weights", "2", "1", "a", "b", "m4"])
    assert "a: 10 samples × 2 = 20 per epoch" in first.output
    wrong = CliRunner().invoke(shards, ["mix", "a", "b", "m5", "--weights", "1"])
    assert isinstance(wrong.exception, UserError)
    assert str(wrong.exception) == "1 weight for 2 datasets: give one for each"
