"""Extending a dataset: atomic, and what was there keeps its place."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.fields import parse_fields
from pipeline.dataset.index import find_shards, index_shards
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.loading.readahead import read_samples
from pipeline.storage.store import Store, open_store
from pipeline.views.extend import ExtendResult, extend_dataset
from pipeline.views.prefix import find_prefix, first_shards
from tests.pipeline.views.test_mix import mix, rows
from tests.pipeline.views.test_view import digests, keys, view
from tests.support.data.fake_datasets import write_fake
from tests.support.data.foreign_tars import pack, picture
from tests.support.datasets import build_dataset


def extend(dataset: Dataset, scratch: Path, *new: str | Dataset) -> tuple[Dataset, ExtendResult]:
    urls = [one if isinstance(one, str) else one.store.url for one in new]
    scratch.mkdir(exist_ok=True)
    made = extend_dataset(dataset.store.url, urls, scratch)
    return open_dataset(dataset.store.url), made


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three folders with one tar each, of 6, 5 and 4 images of the classes 0 to 2."""
    folder = tmp_path_factory.mktemp("tars")
    found = []
    for n in (6, 5, 4):
        built = build_dataset(f"synthetic:?count={n}&classes=3&seed={n}", str(folder / "built" / str(n)))
        (folder / str(n)).mkdir()
        shutil.copy(Path(built.store.root, "shard-000000.tar"), folder / str(n) / f"part-{n}.tar")
        found.append(folder / str(n) / f"part-{n}.tar")
    return found


def index(folder: Path) -> Dataset:
    store = open_store(str(folder))
    index_shards(store, find_shards(store), store, checksums=True)
    return open_dataset(str(folder))


def test_new_tars_in_the_folder_of_an_index_are_added(tars: list[Path], tmp_path: Path) -> None:
    shutil.copy(tars[0], tmp_path / "x")  # not a tar by its name
    (tmp_path / "d").mkdir()
    shutil.copy(tars[0], tmp_path / "d" / "a.tar")
    before = index(tmp_path / "d")
    shutil.copy(tars[1], tmp_path / "d" / "b.tar")
    untouched = digests(tmp_path / "d")
    grown, made = extend(before, tmp_path / "scratch", before.store.url)
    assert (made.known, made.shards, made.samples) == (1, 1, 5)
    assert grown.samples == 11
    assert grown.manifest.parts == ()
    assert verify(grown) == []
    now = digests(tmp_path / "d")
    assert {path: now[path] for path in untouched if not path.endswith("manifest.json")} == {
        path: digest for path, digest in untouched.items() if not path.endswith("manifest.json")
    }
    with pytest.raises(UserError, match="has 2 tars of it already, and there is no other"):
        extend(grown, tmp_path / "scratch2", before.store.url)


def test_tars_and_datasets_elsewhere_are_added_to_an_index_and_to_a_view(
    tars: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    shutil.copy(tars[0], tmp_path / "d")
    before = index(tmp_path / "d")
    other = index(Path(shutil.copytree(tars[2].parent, tmp_path / "other")))
    chosen, _ = view(before, tmp_path / "view", where="label_number > 0")
    for nth, dataset in enumerate((before, chosen)):
        old_keys, old_fingerprint = keys(dataset), dataset.fingerprint
        grown, made = extend(dataset, tmp_path / f"scratch{nth}", str(tars[1]), other)
        assert made.samples == 9
        assert keys(grown)[: len(old_keys)] == old_keys
        assert grown.samples == len(old_keys) + 9
        assert verify(grown) == []
        assert len(read_samples(grown, np.arange(grown.samples)).encoded) == grown.samples
        assert {part.name for part in grown.parts} == {dataset.parts[0].name}
        assert not grown.manifest.weighted
        assert find_prefix(grown, old_fingerprint) == 1
        prefix = first_shards(grown, 1, old_fingerprint)
        assert keys(prefix) == old_keys
        again, _ = view(grown, tmp_path / f"again{nth}", where="shard like '+%'")
        assert again.samples == 9
    assert open_dataset(str(tmp_path / "d")).manifest.has_tars
    assert not open_dataset(str(tmp_path / "view")).manifest.has_tars


def test_new_classes_come_last_and_numbers_of_raw_tars_are_those_of_the_dataset(
    tars: list[Path], tmp_path: Path
) -> None:
    a = write_fake(tmp_path / "a", [rows("a", label=1)], ["cat", "dog"])
    b = write_fake(tmp_path / "b", [rows("b", label=0) + rows("c", label=1)], ["bee", "dog"])
    grown, made = extend(a, tmp_path / "s1", b)
    assert grown.manifest.classes == ["cat", "dog", "bee"]
    assert made.classes == ["bee"]
    assert grown.locate(np.arange(3)).label.tolist() == [1, 2, 1]
    named, _ = extend(grown, tmp_path / "s2", str(tars[1]))
    assert named.manifest.classes == ["cat", "dog", "bee"]
    assert named.locate(np.arange(3, 8)).label.max() == 2
    two = write_fake(tmp_path / "two", [rows("x", label=0)], ["cat", "dog"])
    with pytest.raises(UserError, match=r"has the label 2, but .* has only 2 classes, with names"):
        extend(two, tmp_path / "s3", str(tars[1]))


def test_new_tars_are_read_with_the_fields_of_the_index(tmp_path: Path) -> None:
    def tar(name: str, labels: list[bytes], first: int) -> None:
        files = {}
        for i, label in enumerate(labels, first):
            files |= {f"{i}.rgb.jpg": picture(i), f"{i}.seg.png": picture(i, "PNG"), f"{i}.cls": label}
            files |= {f"{i}.json": json.dumps({"score": i / 2}).encode()}
        pack(tmp_path / "d" / name, files)

    tar("a.tar", [b"0", b"2"], 0)
    store = open_store(str(tmp_path / "d"))
    index_shards(store, ["a.tar"], store, fields=parse_fields("rgb.jpg", keep="score"))
    tar("b.tar", [b"1 4 7", b"2", b"1"], 2)
    with pytest.raises(UserError, match=r"b\.tar: 2 at byte \d+: label 1 4 7 is a class name"):
        extend(open_dataset(store.url), tmp_path / "refused", store.url)
    tar("b.tar", [b"1", b"2", b"1"], 2)
    grown, _ = extend(open_dataset(store.url), tmp_path / "scratch", store.url)
    located = grown.locate(np.arange(5))
    assert located.label.tolist() == [0, 2, 1, 2, 1]
    assert located.size.tolist() == [len(picture(i)) for i in range(5)]
    assert grown.read_index_table(1, kept=True)["score"].to_pylist() == [1.0, 1.5, 2.0]


def test_a_mix_grows_by_a_part_or_by_more_of_one(tmp_path: Path) -> None:
    a, b, c = (write_fake(tmp_path / name, [rows(f"{name}1", f"{name}2")], []) for name in "abc")
    mixed, _ = mix([a, b], tmp_path / "mix", "1", "0.5")
    more = write_fake(tmp_path / "more", [rows("m1")], [])
    extend(b, tmp_path / "s1", more)
    grown, _ = extend(mixed, tmp_path / "s2", c)
    assert [(part.name, part.weight) for part in grown.parts] == [("a", "1"), ("b", "1/2"), ("c", "1")]
    assert find_prefix(grown, mixed.fingerprint) == 2


def test_the_same_data_again_is_refused(tmp_path: Path) -> None:
    a = write_fake(tmp_path / "a", [rows("a1", "a2"), rows("a3")], [])
    copy = open_dataset(str(shutil.copytree(tmp_path / "a", tmp_path / "copy")))
    with pytest.raises(UserError, match=r"has the same samples as shard-000000\.tar"):
        extend(a, tmp_path / "s", copy)
    half, _ = view(a, tmp_path / "half", where="key = 'a2'")
    before = digests(tmp_path / "half")
    grown, _ = extend(half, tmp_path / "s", a)  # the same tars: the indexes get names of their own
    assert keys(grown) == ["a2", "a1", "a2", "a3"]
    assert {path for path, digest in digests(tmp_path / "half").items() if before.get(path) == digest} == {
        path for path in before if not path.endswith("manifest.json")
    }


def test_the_same_data_again_is_refused_also_if_its_classes_have_other_numbers_here(tmp_path: Path) -> None:
    a = write_fake(tmp_path / "a", [rows("a", label=1)], ["cat", "dog"])
    b = write_fake(tmp_path / "b", [rows("b", label=0) + rows("c", label=1)], ["bee", "dog"])
    grown, _ = extend(a, tmp_path / "s1", b)
    before = digests(tmp_path / "a")
    for nth, new in enumerate(([b], [write_fake(tmp_path / "z", [rows("z")], ["ant"]), b])):
        with pytest.raises(UserError, match=r"has the same samples as"):
            extend(grown, tmp_path / f"again{nth}", *new)
    assert digests(tmp_path / "a") == before


class CrashError(Exception):
    pass


@pytest.mark.parametrize("writes", range(4))
def test_a_crash_leaves_the_old_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    a = write_fake(tmp_path / "a", [rows("a1", "a2")], [])
    b = write_fake(tmp_path / "b", [rows("b1"), rows("b2")], [])
    write, left = Store.write, [writes]

    def crash(store: Store, name: str, data: bytes) -> Any:
        if left[0] == 0:
            raise CrashError
        left[0] -= 1
        write(store, name, data)

    monkeypatch.setattr(Store, "write", crash)
    with pytest.raises(CrashError):  # 2 indexes, the table, the manifest
        extend(a, tmp_path / "s", b)
    monkeypatch.undo()
    assert open_dataset(a.store.url).fingerprint == a.fingerprint
    grown, _ = extend(a, tmp_path / "s", b)
    assert grown.samples == 4
    assert a.shard_content.to_pylist()  # who opened the old dataset still finds its table


def test_extending_again_and_again_leaves_two_tables(tmp_path: Path) -> None:
    dataset = write_fake(tmp_path / "d", [rows("d")], [])
    for name in "abc":
        dataset, _ = extend(dataset, tmp_path / "s", write_fake(tmp_path / name, [rows(name)], []))
    assert keys(dataset) == ["d", "a", "b", "c"]
    assert sorted(path.name for path in (tmp_path / "d").glob("*.parquet")) == [
        "shards-3.parquet",
        "shards-4.parquet",
    ]
