"""Views, mixes and extensions of datasets whose labels are several classes, or numbers."""

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.fields import parse_fields
from pipeline.dataset.index import find_shards, index_shards
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from pipeline.views.extend import extend_dataset
from pipeline.views.mix import make_mix
from tests.pipeline.views.test_view import keys, view


def indexed(folder: Path, labels: list[Any]) -> Dataset:
    """A dataset of one tar: an image for each label; None: without a label."""
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for nth, label in enumerate(labels):
            image = io.BytesIO()
            Image.new("RGB", (20 + nth, 20)).save(image, "JPEG")
            files = {"jpg": image.getvalue()}
            if label is not None:
                files["json"] = json.dumps({"label": label}).encode()
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{folder.name}{nth}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    store = open_store(str(folder))
    index_shards(store, find_shards(store), store)
    return open_dataset(str(folder))


def test_several_classes(tmp_path: Path) -> None:
    m = indexed(tmp_path / "m", [["dog", "cat"], ["owl"], None, ["cat"]])
    n = indexed(tmp_path / "n", [["owl"], ["emu", "owl"]])
    assert keys(view(m, tmp_path / "cats", where="list_contains(label, 'cat')")[0]) == ["m0", "m3"]
    assert keys(view(m, tmp_path / "none", where="label is null")[0]) == ["m2"]
    make_mix([m, n], [Fraction(1)] * 2, open_store(str(tmp_path / "mix")))
    (tmp_path / "scratch").mkdir()
    extend_dataset(m.store.url, [n.store.url], tmp_path / "scratch")
    for united in (open_dataset(str(tmp_path / "mix")), open_dataset(m.store.url)):
        assert united.manifest.classes == ["cat", "dog", "owl", "emu"]
        flags = united.labels(united.locate(np.arange(6)).row)
        assert np.isnan(flags[2]).all()
        assert flags[[0, 1, 3, 4, 5]].tolist() == [
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [1, 0, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 1, 1],
        ]


def test_numbers(tmp_path: Path) -> None:
    one = indexed(tmp_path / "r", [0.5, 1.25, None, 7])
    assert keys(view(one, tmp_path / "large", where="label > 1")[0]) == ["r1", "r3"]
    two = indexed(tmp_path / "t", [[0.5, 1.5], [1.25, -3.5]])
    assert keys(view(two, tmp_path / "second", where="label[2] < 0")[0]) == ["t1"]
    names = indexed(tmp_path / "m", [["dog", "cat"]])
    with pytest.raises(UserError, match="of the kind classes: they cannot be mixed"):
        make_mix([names, one], [Fraction(1)] * 2, open_store(str(tmp_path / "mix")))
    with pytest.raises(UserError, match="other numbers to predict"):
        make_mix([one, two], [Fraction(1)] * 2, open_store(str(tmp_path / "mix")))


def test_kept_columns_do_not_have_the_names_of_columns_of_conditions() -> None:
    with pytest.raises(UserError, match="has a column shard of its own; choose another name"):
        parse_fields(keep="shard")


def test_tars_that_extend_a_view_are_read_with_the_fields_of_its_source(tmp_path: Path) -> None:
    indexed(tmp_path / "a", ["dog", "cat"])
    indexed(tmp_path / "b", ["cat"])
    store = open_store(str(tmp_path / "a"))
    fields = parse_fields(label="json:label", keep="label_text=label")
    index_shards(store, find_shards(store), store, fields=fields, overwrite=True)
    chosen, _ = view(open_dataset(store.url), tmp_path / "view", where="label_text = 'dog'")
    (tmp_path / "scratch").mkdir()
    extend_dataset(chosen.store.url, [str(tmp_path / "b" / "a.tar")], tmp_path / "scratch")
    grown = open_dataset(chosen.store.url)
    assert keys(view(grown, tmp_path / "cats", where="label_text = 'cat'")[0]) == ["b0"]
