"""Which files and fields of existing tars are used, and that nothing is taken or left out without a word."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.build.build import build
from pipeline.build.image_table import SourceOptions
from pipeline.build.shard_writer import BuildOptions
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.fields import Fields, parse_fields
from pipeline.dataset.repair import repair
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.data.foreign_tars import Files, check, index, pack, picture, refused, samples


def indexed(folder: Path, files: Files, **options: str) -> tuple[Dataset, list[str]]:
    """A dataset of one tar with these files, and the notes."""
    pack(folder / "x.tar", files)
    found = index(folder, overwrite=True, fields=parse_fields(**options))
    return open_dataset(str(folder)), found.notes


def labels_of(dataset: Dataset) -> list[str | None]:
    labels = dataset.locate(np.arange(dataset.samples)).label.tolist()
    return [dataset.manifest.classes[label] if label >= 0 else None for label in labels]


TIMES = {
    f"22.0{i}.{extension}": data
    for i in (5, 6)
    for extension, data in (("png", picture(i, "PNG")), ("cls", str(i).encode()))
}


def test_names_with_dots_are_refused_or_split_at_the_last_dot(tmp_path: Path) -> None:
    pack(tmp_path / "x.tar", TIMES)
    said = refused(tmp_path)
    assert "x.tar: 22 at byte 0 has 2 images, .05.png and .06.png" in said
    assert "--split-at last-dot" in said
    assert "--image" not in said
    assert "has 2 images" in refused(tmp_path, skip_damaged=True)
    assert not (tmp_path / "manifest.json").exists()
    dataset, notes = indexed(tmp_path, TIMES, split_at="last-dot")
    assert check(dataset) == {"22.05": (TIMES["22.05.png"], 5), "22.06": (TIMES["22.06.png"], 6)}
    assert notes == []
    dataset, notes = indexed(tmp_path, TIMES, image="05.png", label="06.cls")
    assert check(dataset) == {"22": (TIMES["22.05.png"], 6)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.1.jpg", "b.2.jpg"], "images have different extensions: .1.jpg (x.tar: a at byte 0) and .2.jpg (x.tar: b at byte 1"),
        (["a.jpg", "b.2.jpg"], "otherwise choose with --image jpg"),
        (["b.2.jpg", "b.2.cls"], "x.tar: b at byte 0 has files .2.jpg and .2.cls"),
    ],
)  # fmt: skip
def test_other_signs_of_dots_in_names(tmp_path: Path, files: list[str], message: str) -> None:
    contents = {name: b"1" if name.endswith("cls") else picture(i) for i, name in enumerate(files)}
    pack(tmp_path / "x.tar", contents)
    said = refused(tmp_path)
    assert message in said
    assert "--split-at last-dot" in said
    _, notes = indexed(tmp_path, contents, split_at="last-dot")
    assert notes == []


def test_dots_in_names_are_found_over_several_tars(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"a.1.jpg": picture(0)})
    pack(tmp_path / "b.tar", {"b.jpg": picture(1)})
    assert ".1.jpg (a.tar: a at byte 0) and .jpg (b.tar: b at byte 0)" in refused(tmp_path)


def test_one_image_with_a_dot_in_each_sample_is_used_and_told(tmp_path: Path) -> None:
    files = {
        f"{key}.{e}": picture(i) if e == "rgb.jpg" else b"3"
        for i, key in enumerate("ab")
        for e in ("rgb.jpg", "cls")
    }
    dataset, notes = indexed(tmp_path, files)
    assert check(dataset) == {key: (files[f"{key}.rgb.jpg"], 3) for key in "ab"}
    assert notes == ["the images are the files .rgb.jpg (2)"]


def test_the_image_is_chosen_by_its_extension(tmp_path: Path) -> None:
    files = {
        "a.rgb.jpg": picture(1), "a.seg.png": picture(2, "PNG"), "a.cls": b"0",
        "b.RGB.jpg": picture(3), "b.seg.png": picture(4, "PNG"), "b.cls": b"1",
        "c.seg.png": picture(5, "PNG"), "c.cls": b"1",
    }  # fmt: skip
    pack(tmp_path / "x.tar", files)
    assert "has 2 images, .rgb.jpg and .seg.png" in refused(tmp_path)
    dataset, notes = indexed(tmp_path, files, image="rgb.jpg")
    assert check(dataset) == {"a": (files["a.rgb.jpg"], 0), "b": (files["b.RGB.jpg"], 1)}
    assert notes == []
    dataset, notes = indexed(tmp_path, files, image="rgb.jpg,seg.png")
    assert check(dataset)["c"] == (files["c.seg.png"], 1)
    assert notes == [
        "2 samples with several images: used .rgb.jpg (2) and .seg.png (1), not .seg.png (2) (--image chooses)"
    ]
    with pytest.raises(UserError, match=r"no sample has a file \.depth\.png, which --image names"):
        indexed(tmp_path, files, image="depth.png")


def images(trees: list[object], extension: str = "json") -> Files:
    files: Files = {}
    for i, tree in enumerate(trees):
        data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        files |= {f"{i}.jpg": picture(i), f"{i}.{extension}": data}
    return files


def test_json_values_that_are_no_label_are_counted_with_the_reason(tmp_path: Path) -> None:
    trees = [{"label": 3.0}, {"label": None}, {"label": True}, {"label": {"id": 1}}, {"label": None}, {"x": 1}, [1],
             {"label": float("nan"), "cls": 2}]  # fmt: skip
    dataset, notes = indexed(tmp_path, images(trees))
    assert labels_of(dataset) == ["3", None, None, None, None, None, None, "2"]
    assert [note.partition(" (the first")[0] for note in notes] == [
        "2 samples without a label: the field label of the .json file is null",
        "1 sample without a label: the field label of the .json file cannot be a label: true may be a flag; to use it as class "
        "0 or 1, name its field with --label",
        "1 sample without a label: the field label of the .json file cannot be a label: it is an object; choose a field of it: "
        "id",
    ]
    assert "(the first: x.tar: 1 at byte " in notes[0]


def test_the_label_is_chosen_by_extension_or_by_path(tmp_path: Path) -> None:
    trees = [
        {"meta": {"tag": "dog", "on": True}, "label": 9},
        {"meta": {"tag": "cat", "on": False}},
        {"meta": {"on": False}},
    ]
    dataset, notes = indexed(tmp_path, images(trees), label="json:meta.tag")
    assert labels_of(dataset) == ["dog", "cat", None]
    assert notes == [
        "1 sample without a label: the .json file has no field meta.tag (the first: x.tar: 2 at byte 5120)"
    ]
    dataset, _ = indexed(tmp_path, images(trees), label="json:meta.on")  # named, so a flag is class 0 or 1
    assert labels_of(dataset) == ["1", "0", "0"]
    dataset, _ = indexed(tmp_path, images([b"bird", b"ant"], "txt"), label="txt")
    assert labels_of(dataset) == ["bird", "ant"]
    dataset, _ = indexed(tmp_path, images([b"bird", b"ant"], "txt"))  # a caption is no label
    assert labels_of(dataset) == [None, None]
    for label, reason in (("json:q", "the .json file has no field q"), ("txt", "there is no .txt file")):
        with pytest.raises(UserError, match=f"no sample has the label that --label {label} names: {reason}"):
            indexed(tmp_path, images(trees), label=label)


def test_a_label_that_contradicts_the_others_is_named(tmp_path: Path) -> None:
    files = images([b"1 4 7", b"2", b"3"], "cls")
    pack(tmp_path / "x.tar", files)
    assert "x.tar: 0 at byte 512: label 1 4 7 is a class name, but 2 of 3 labels are numbers" in refused(
        tmp_path
    )
    found = index(tmp_path, skip_damaged=True)
    assert (found.skipped.count, found.manifest.samples, found.manifest.classes) == (
        1,
        2,
        ["0", "1", "2", "3"],
    )
    assert "label 1 4 7 is a class name" in found.skipped.listed[0]
    assert verify(open_dataset(str(tmp_path))) == []
    path = tmp_path / "index/x.parquet"
    before = path.read_bytes()
    path.unlink()
    assert repair(str(tmp_path)).unrepaired == []  # what was left out is left out again
    assert path.read_bytes() == before
    dataset, _ = indexed(tmp_path, files, kind="classes")
    assert dataset.read_index_table(0)["label"].to_pylist() == [[1, 4, 7], [2], [3]]


def test_of_two_labels_the_one_that_is_no_class_is_named(tmp_path: Path) -> None:
    pack(tmp_path / "x.tar", images([b"1 4 7", b"2"], "cls"))
    assert "x.tar: 0 at byte 512: label 1 4 7 is a class name, but 1 of 2 labels is a number" in refused(
        tmp_path
    )
    pack(tmp_path / "x.tar", images([b"cat", b"2"], "cls"))
    assert "label 2 is a number, but 1 of 2 labels is a class name" in refused(tmp_path)


def test_kept_columns_have_types_and_are_repaired(tmp_path: Path) -> None:
    trees = [
        {"score": 10**400, "caption": "ü", "ok": True, "meta": {"n": 2}, "odd": 1, "tags": ["a"]},
        {"score": 0.5, "caption": None, "ok": False, "meta": {"n": 3}, "odd": "x", "label": 4},
        {"ok": True, "score": float("nan"), "meta": {}, "caption": "\ud800", "label": 4},
    ]
    dataset, notes = indexed(tmp_path, images(trees), keep="score,caption,ok,n=meta.n,odd,tags")
    table = dataset.read_index_table(0, kept=True)
    expected = {
        "score": (pa.float64(), [float("inf"), 0.5]), "caption": (pa.string(), ["ü", None, "?"]), "ok": (pa.bool_(), [True, False, True]),
        "n": (pa.int64(), [2, 3, None]), "odd": (pa.string(), ["1", "x", None]), "tags": (pa.string(), ['["a"]', None, None]),
    }  # fmt: skip
    for name, (kind, values) in expected.items():
        assert table.schema.field(name).type == kind
        assert table[name].to_pylist()[: len(values)] == values
    assert [note for note in notes if "column" in note] == [
        "the column odd is text, because its values are of different kinds or lists: 1 int, 1 text",
        "the column tags is text, because its values are of different kinds or lists: 1 other",
    ]
    assert labels_of(dataset) == [None, "4", "4"]
    path = tmp_path / "index/x.parquet"
    before = path.read_bytes()
    path.unlink()
    assert repair(str(tmp_path)).unrepaired == []
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"no \.json file has the field sore that --keep-json names"):
        indexed(tmp_path, images(trees), keep="s=sore")


def test_files_of_macos_and_hidden_files_are_no_samples(tmp_path: Path) -> None:
    ours = samples(["a", "d/b"])
    others = ["__MACOSX/a.jpg", "__MACOSX/._a.jpg", "._a.jpg", ".DS_Store", "d/.DS_Store", "d/._b.cls", "d/__MACOSX/b.jpg",
              ".ipynb_checkpoints/a.jpg", "d/.thumbs/b.jpg", "README"]  # fmt: skip
    pack(tmp_path / "x.tar", {**{name: picture(9) for name in others}, **ours})
    found = index(tmp_path)
    assert sorted(check(open_dataset(str(tmp_path)))) == ["a", "d/b"]
    assert (found.other_files, found.without_image) == (len(others), 0)


def test_tars_that_are_empty_compressed_or_cut_off_are_skipped_and_listed(tmp_path: Path) -> None:
    whole = pack(tmp_path / "a.tar", samples(["a", "b"])).read_bytes()
    (tmp_path / "cut.tar").write_bytes(pack(tmp_path / "c.tar", samples(["c", "d"])).read_bytes()[:3500])
    (tmp_path / "c.tar").unlink()
    (tmp_path / "empty.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "zip.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    (tmp_path / "zipped.tar").write_bytes((tmp_path / "zip.tar.gz").read_bytes())
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x.txt"), io.BytesIO())
    assert "zip.tar.gz is compressed" in refused(tmp_path)
    assert "Decompress it, or pass --skip-damaged" in refused(tmp_path)
    for checksums in (False, True):
        found = index(tmp_path, skip_damaged=True, checksums=checksums, overwrite=True)
        assert sorted(check(open_dataset(str(tmp_path)))) == ["a", "b", "c"]
        listed = "\n".join(found.skipped.listed)
        for text in (
            "cut.tar: the tar is cut off",
            "empty.tar: the file is empty",
            "zip.tar.gz is compr",
            "zipped.tar is compr",
        ):
            assert text in listed
        assert found.skipped.count == 4
        assert any("none.tar" in note and "without samples" in note for note in found.notes)
    assert (tmp_path / "a.tar").read_bytes() == whole


def built(
    source: Path, dest: Path, fields: Fields, strict: bool = False
) -> tuple[Dataset, list[str], tuple[str, ...]]:
    options = BuildOptions(source=SourceOptions(fields=fields), strict=strict)
    result = build(str(source), open_store(str(dest)), options)
    return open_dataset(str(dest)), result.skipped, result.notes


def test_build_of_tars_has_the_same_fields(tmp_path: Path) -> None:
    trees = [{"tags": ["dog", "cat"], "score": 1}, {"tags": ["cat"], "score": 0.5}, {"tags": [], "score": 2}]
    files = {f"{i}.{e}": picture(i) if e == "rgb.jpg" else json.dumps(tree).encode()
             for i, tree in enumerate(trees) for e in ("json", "rgb.jpg", "seg.png") if e != "seg.png" or i}  # fmt: skip
    files = {name: picture(7, "PNG") if name.endswith("png") else data for name, data in files.items()}
    pack(tmp_path / "tars" / "x.tar", files)
    with pytest.raises(UserError, match=r"has 2 images, \.rgb\.jpg and \.seg\.png"):
        built(tmp_path / "tars", tmp_path / "dest", Fields())
    fields = parse_fields("rgb.jpg", "json:tags", keep="score")
    dataset, skipped, _ = built(tmp_path / "tars", tmp_path / "dest", fields)
    assert skipped == []
    assert (dataset.manifest.labels, dataset.manifest.classes) == ("classes", ["cat", "dog"])
    table = dataset.read_index_table(0, kept=True)
    rows = {
        key: (label, score)
        for key, label, score in zip(*(table[c].to_pylist() for c in ("key", "label", "score")), strict=True)
    }
    assert rows == {"0": ([0, 1], 1.0), "1": ([0], 0.5), "2": ([], 2.0)}
    path = tmp_path / "dest/index/shard-000000.parquet"
    before = path.read_bytes()
    path.unlink()
    assert repair(str(tmp_path / "dest")).unrepaired == []
    assert pq.read_table(path).equals(pq.read_table(pa.BufferReader(before)))
    assert verify(dataset) == []


def test_build_of_tars_splits_names_and_leaves_damage_out(tmp_path: Path) -> None:
    whole = pack(
        tmp_path / "tars/x.tar", TIMES | {"23.1.png": picture(8, "PNG"), "23.1.cls": b"5"}
    ).read_bytes()
    (tmp_path / "tars/y.tar").write_bytes(whole[:4700])
    (tmp_path / "tars/x.tar").unlink()
    fields = parse_fields(split_at="last-dot")
    with pytest.raises(UserError, match=r"the tar is cut off.*Build without --strict"):
        built(tmp_path / "tars", tmp_path / "strict", fields, strict=True)
    dataset, skipped, _ = built(tmp_path / "tars", tmp_path / "dest", fields)
    assert {key.replace("22_", ""): label for key, (_, label) in check(dataset).items()} == {"05": 5, "06": 6}
    assert len(skipped) == 1
    assert "y.tar: the tar is cut off" in (tmp_path / "dest/left-out.txt").read_text()
