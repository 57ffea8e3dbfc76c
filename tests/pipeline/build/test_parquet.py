"""Parquet files as people have them: odd labels, several columns, rows without an image. Nothing is misread in silence."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset

from pipeline.build.build import build
from pipeline.build.image_table import Source, SourceOptions, rows_of
from pipeline.build.shard_writer import BuildOptions, Receipt
from pipeline.build.sources import open_source
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.fields import parse_fields
from pipeline.dataset.index import find_shards, index_shards
from pipeline.dataset.manifest import BUILDING, content_digest
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.data.pictures import IMAGE_TYPE, parquet_file, picture


def opened(source: Path, tmp_path: Path, splits: Any = None, **fields: str) -> Source:
    spool = open_store(str(tmp_path / "spool"))
    spool.write(BUILDING, b"{}")
    options = SourceOptions(splits=splits, fields=parse_fields(**fields))
    return open_source(str(source), lambda: spool, options=options)


def built(source: Path, to: Path, **fields: str) -> Dataset:
    options = BuildOptions(source=SourceOptions(fields=parse_fields(**fields)))
    build(str(source), open_store(str(to)), options)
    return open_dataset(str(to))


def labels(source: Source) -> list[Any]:
    return source.items["label"].to_pylist()


def label_of(dataset: Dataset) -> dict[str, Any]:
    index = dataset.read_index_table(0)
    return dict(zip(index["key"].to_pylist(), index["label"].to_pylist(), strict=True))


# ---- labels -----------------------------------------------------------------------------------------------------


def test_whole_floats_are_class_numbers_and_gaps_are_no_label(tmp_path: Path) -> None:
    """pandas makes floats of whole numbers where one is missing."""
    path = parquet_file(tmp_path / "x.parquet", label=pa.array([10.0, None, 2.0, float("nan"), 0.0]))
    source = opened(path, tmp_path)
    assert labels(source) == [10, -1, 2, -1, 0]
    assert source.classes == [str(i) for i in range(11)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([[0, 2], [], None, [1]]), [[0, 2], [], None, [1]]),
        (pa.array([[0.0, 2.0], [1.0], None, []]), [[0, 2], [1], None, []]),
        (pa.array([["b", "a"], ["c"], None, []]), [[0, 1], [2], None, []]),
        (pa.array([[0, 1, 1], [0, 0, 0], [1, 0, 0], None]), [[1, 2], [], [0], None]),
    ],
)
def test_lists_are_several_classes(values: pa.Array, expected: list[Any], tmp_path: Path) -> None:
    dataset = built(parquet_file(tmp_path / "x.parquet", label=values), tmp_path / "out")
    assert dataset.manifest.labels == "classes"
    assert [label_of(dataset)[str(i)] for i in range(4)] == expected
    assert verify(dataset) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([0.5, None, 2.0]), [[0.5], None, [2.0]]),
        (pa.array([[0.5, 1.0], None, [2.0, 3.0]]), [[0.5, 1.0], None, [2.0, 3.0]]),
    ],
)
def test_fractions_are_numbers_to_predict(values: pa.Array, expected: list[Any], tmp_path: Path) -> None:
    dataset = built(parquet_file(tmp_path / "x.parquet", label=values), tmp_path / "out")
    assert dataset.manifest.labels == "numbers"
    assert [label_of(dataset)[str(i)] for i in range(3)] == expected
    assert np.isnan(dataset.labels(dataset.index(0))).any()


def test_whole_numbers_can_be_numbers_to_predict(tmp_path: Path) -> None:
    dataset = built(parquet_file(tmp_path / "x.parquet", label=[3, 40]), tmp_path / "out", kind="numbers")
    assert label_of(dataset) == {"0": [3.0], "1": [40.0]}


@pytest.mark.parametrize(
    ("column", "kind"),
    [([0, 2, 1], None), ([[0, 2], [1], []], None), ([0.5, 1.0, 2.0], None), ([3, 4, 5], "numbers")],
)
def test_indexing_the_tars_again_gives_the_same_labels(column: Any, kind: str | None, tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "x.parquet", label=column)
    dataset = built(path, tmp_path / "out", **({"kind": kind} if kind else {}))
    store = open_store(str(tmp_path / "out"))
    again = tmp_path / "again"
    fields = parse_fields(kind=kind)
    index_shards(store, find_shards(store), open_store(str(again)), fields=fields, checksums=True)
    second = open_dataset(str(again))
    assert label_of(second) == label_of(dataset)
    assert second.fingerprint == dataset.fingerprint
    assert label_of(built(tmp_path / "out", tmp_path / "third")) == label_of(
        dataset
    )  # and building from the dataset
    assert content_digest(second.read_index_table(0)) == content_digest(dataset.read_index_table(0))


def test_a_label_that_contradicts_the_others_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "x.parquet", label=["cat", "dog", "3"])
    with pytest.raises(UserError, match=r"x\.parquet: 2: label 3 is a number.*--label chooses another"):
        opened(path, tmp_path)
    assert opened(path, tmp_path, label="none").classes == []


@pytest.mark.parametrize("feature", ["plain", "Sequence", "List", "list"])
def test_class_names_of_the_hub_are_used(feature: str, tmp_path: Path) -> None:
    names = {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}
    features: dict[str, Any] = {
        "plain": names,
        "Sequence": {"feature": names, "_type": "Sequence"},
        "List": {"feature": names, "_type": "List"},
        "list": [names],
    }
    values = [2, 0] if feature == "plain" else [[2, 0], [0]]
    path = parquet_file(
        tmp_path / "x.parquet", {"species": features[feature]}, species=values, text=["a", "b"]
    )
    source = opened(path, tmp_path)
    assert source.classes == ["ant", "bee", "cat"]
    assert labels(source) == ([2, 0] if feature == "plain" else [[0, 2], [0]])
    assert source.notes == (f"the labels are the column species of {path}; --label chooses another: text",)


def test_files_with_other_class_names_or_columns_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        parquet_file(tmp_path / "in" / f"{number}.parquet", features, label=[0, 1])
    with pytest.raises(UserError, match=r"0\.parquet and 1\.parquet have different class names"):
        opened(tmp_path / "in", tmp_path)
    parquet_file(tmp_path / "in" / "1.parquet", other=[0, 1])
    with pytest.raises(UserError, match=r"1\.parquet has no column label, which other files have"):
        opened(tmp_path / "in", tmp_path)


# ---- which column -----------------------------------------------------------------------------------------------


def test_several_columns_of_labels_are_refused_with_the_choice(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "x.parquet", fine_label=[0, 1], coarse_label=[1, 0], num_classes=[2, 2])
    with pytest.raises(
        UserError, match=r"choose one with --label: fine_label, coarse_label \(or --label none\)"
    ):
        opened(path, tmp_path)
    assert labels(opened(path, tmp_path, label="coarse_label")) == [1, 0]
    assert labels(opened(path, tmp_path, label="none")) == [-1, -1]
    with pytest.raises(UserError, match=r"has no column colour \(--label\); it has fine_label"):
        opened(path, tmp_path, label="colour")


def test_the_column_that_is_taken_is_told(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "x.parquet", label=[0, 1], label_text=["a", "b"])
    assert opened(path, tmp_path).notes == (
        f"the labels are the column label of {path}; --label chooses another: label_text",
    )
    assert opened(parquet_file(tmp_path / "y.parquet", label=[0, 1]), tmp_path).notes == ()
    path = parquet_file(tmp_path / "z.parquet", caption=["a", "b"])
    source = opened(path, tmp_path)
    assert labels(source) == [-1, -1]
    assert source.notes == (f"no column of {path} is called a label; --label chooses one: caption",)


def test_a_field_of_a_struct_or_of_json_text_can_be_the_label(tmp_path: Path) -> None:
    path = parquet_file(
        tmp_path / "x.parquet", meta=[{"species": "bee"}, {"species": "ant"}], json=['{"a": {"b": 1}}', "{}"]
    )
    assert labels(opened(path, tmp_path, label="meta.species")) == [1, 0]
    assert labels(opened(path, tmp_path, label="json:a.b")) == [1, -1]


def test_several_columns_of_images(tmp_path: Path) -> None:
    images = [[{"bytes": picture(10 * n + i), "path": f"{n}{i}.jpg"} for i in range(2)] for n in range(3)]
    first, second, third = (pa.array(column, IMAGE_TYPE) for column in images)
    path = parquet_file(tmp_path / "x.parquet", left=first, right=second, image=third)
    source = opened(path, tmp_path)
    assert [item.key for item in rows_of(source.items)] == ["20", "21"]
    assert source.notes[0] == "the images are the column image; --image chooses another: left, right"
    path = parquet_file(tmp_path / "y.parquet", left=first, right=second, image=["a", "b"])
    with pytest.raises(UserError, match="several columns of images: choose one with --image: left, right"):
        opened(path, tmp_path)
    assert [item.key for item in rows_of(opened(path, tmp_path, image="right").items)] == ["10", "11"]
    with pytest.raises(UserError, match="column image has the type string, expected the images' bytes"):
        opened(path, tmp_path, image="image")


# ---- rows without an image, and rows with one name --------------------------------------------------------------


def test_rows_without_an_image_are_left_out_and_listed(tmp_path: Path) -> None:
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "3.jpg").write_bytes(picture(3))
    images = [
        {"bytes": picture(0), "path": "0.jpg"},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "3.jpg"},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": None, "path": "../spool/building.json"},
    ]
    path = parquet_file(
        tmp_path / "beside" / "x.parquet", image=pa.array(images, IMAGE_TYPE), label=list(range(6))
    )
    source = opened(path, tmp_path)
    read = source.reader.open()
    assert {item.key: (item.label, read(item)) for item in rows_of(source.items)} == {
        "0": (0, picture(0)),
        "3": (3, picture(3)),
    }
    reason = "it has no bytes, and there is no file {} beside the Parquet file"
    assert source.left_out == (
        "x.parquet, row 1: it has no image",
        "x.parquet, row 2: it has no image",
        f"x.parquet, row 4: {reason.format('gone.jpg')}",
        f"x.parquet, row 5: {reason.format('../spool/building.json')}",
    )
    result = build(str(path), open_store(str(tmp_path / "out")), BuildOptions())
    assert result.skipped == list(source.left_out)
    assert result.lost_classes == []  # these classes had no image in the source
    assert (result.manifest.samples, result.manifest.built["left_out"]) == (2, 4)
    assert len((tmp_path / "out" / "left-out.txt").read_text().splitlines()) == 4
    with pytest.raises(UserError, match=r"row 1: it has no image\. Build without --strict"):
        build(str(path), open_store(str(tmp_path / "strict")), BuildOptions(strict=True))


def test_only_rows_without_an_image(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "x.parquet", image=pa.array([None], IMAGE_TYPE), label=[0])
    with pytest.raises(UserError, match=r"no images in it: x\.parquet, row 0: it has no image"):
        opened(path, tmp_path)


def test_rows_of_one_name_get_keys_of_their_own(tmp_path: Path) -> None:
    images = pa.array([{"bytes": picture(i), "path": "same.jpg"} for i in range(3)], IMAGE_TYPE)
    path = parquet_file(tmp_path / "x.parquet", image=images, label=[0, 1, 2])
    assert label_of(built(path, tmp_path / "out")) == {"same": 0, "same_2": 1, "same_3": 2}


# ---- splits, kept columns, interrupted builds -------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("train.parquet", "test.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
    ],
)
def test_files_of_several_splits_are_refused_or_merged(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        parquet_file(tmp_path / "in" / name, label=[0])
    with pytest.raises(
        UserError, match=r"files of several splits in it .*: choose one, such as .*--splits merge"
    ):
        opened(tmp_path / "in", tmp_path)
    assert labels(opened(tmp_path / "in", tmp_path, splits="merge")) == [0, 0]


def test_kept_columns_are_in_the_index_and_in_the_tar(tmp_path: Path) -> None:
    path = parquet_file(
        tmp_path / "x.parquet",
        label=[0, 1],
        score=[0.5, float("nan")],
        caption=["é", "b"],
        meta=[{"n": 1}, {"n": 2}],
        limit=[float("inf"), 1.0],
    )
    dataset = built(path, tmp_path / "out", keep="score,caption,n=meta.n,limit")
    samples = webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False)
    assert {sample["__key__"]: sample["json"].decode() for sample in samples} == {
        "0": '{"score": 0.5, "caption": "é", "n": 1, "limit": "inf"}',
        "1": '{"caption": "b", "n": 2, "limit": 1.0}',
    }
    assert verify(dataset) == []
    built_again = built(tmp_path / "out", tmp_path / "again")  # from the dataset
    for each in (dataset, built_again):
        rows = each.read_index_table(0, kept=True).to_pylist()
        assert {row["key"]: (row["score"], row["caption"], row["n"]) for row in rows} == {
            "0": (0.5, "é", 1),
            "1": (None, "b", 2),
        }


def test_the_bytes_do_not_depend_on_which_task_ends_first(tmp_path: Path) -> None:
    for number in range(3):
        images = [{"bytes": picture(i), "path": "same.jpg"} for i in range(number, 12, 3)]
        column = pa.array([*images, None], IMAGE_TYPE)
        lists = [[i % 5, 7] for i in range(len(column))]
        parquet_file(
            tmp_path / "in" / f"{number}.parquet", image=column, label=lists, score=[0.5] * len(lists)
        )
    options = BuildOptions(shard_bytes=2000, source=SourceOptions(fields=parse_fields(keep="score")))

    def backwards(function: Any, jobs: Any) -> Any:
        return reversed([function(job) for job in reversed(list(jobs))])

    def last_first(function: Any, jobs: Any) -> Any:
        return [function(job) for job in reversed(list(jobs))]

    runs = {"a": map, "b": backwards, "c": last_first}
    for name, run in runs.items():
        build(str(tmp_path / "in"), open_store(str(tmp_path / name)), options, run=run)
    names = open_store(str(tmp_path / "a")).names()
    assert len(names) > 8
    for name in names:
        assert len({(tmp_path / run / name).read_bytes() for run in runs}) == 1, name


def test_an_interrupted_build_with_options_is_resumed(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "x.parquet", a=[[i, i + 1] for i in range(12)], b=list(range(12)))
    options = BuildOptions(shard_bytes=2000, source=SourceOptions(fields=parse_fields(label="a", keep="b")))
    store = open_store(str(tmp_path / "out"))

    def die(receipt: Receipt, kept: bool) -> None:
        if receipt.name == "shard-000001.tar":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(str(path), store, options, on_shard=die)
    with pytest.raises(UserError, match="with other options"):
        build(str(path), store, BuildOptions(shard_bytes=2000))
    assert build(str(path), store, options).kept == 2
    build(str(path), open_store(str(tmp_path / "clean")), options)
    for name in store.names():
        assert store.read(name) == (tmp_path / "clean" / name).read_bytes(), name
