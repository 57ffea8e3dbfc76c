"""Images with a metadata file beside them: its labels are used, and what is used instead of what is told."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.build.build import build
from pipeline.build.image_table import Source, SourceOptions, rows_of
from pipeline.build.shard_writer import BuildOptions
from pipeline.build.sources import open_source
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.fields import parse_fields
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.data.pictures import tree


def opened(folder: Path, splits: Any = None, **fields: str) -> Source:
    options = SourceOptions(splits=splits, fields=parse_fields(**fields))
    return open_source(str(folder), lambda: open_store(str(folder)), options=options)


def labels(source: Source) -> dict[str, Any]:
    """File → class name or names, numbers, or None."""

    def name(label: Any) -> Any:
        if source.kind == "numbers" or label in (None, -1):
            return None if label == -1 else label
        return [source.classes[i] for i in label] if isinstance(label, list) else source.classes[label]

    return {item.file: name(item.label) for item in rows_of(source.items)}


ROWS: list[dict[str, Any]] = [
    {"file_name": "1.jpg", "label": "cat", "score": 0.5},
    {"file_name": "a/2.jpg", "label": "dog", "score": None},
    {"file_name": "3.jpg", "label": None, "score": 1.0},
]


def write_metadata(folder: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    path = folder / f"metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [
            ",".join(rows[0]),
            *(",".join("" if v is None else str(v) for v in row.values()) for row in rows),
        ]
        path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_labels_of_a_metadata_file_are_used(kind: str, tmp_path: Path) -> None:
    folder = tree(tmp_path / "in", "1.jpg", "a/2.jpg", "3.jpg")
    write_metadata(folder, kind, ROWS)
    source = opened(folder, keep="score")
    assert labels(source) == {"1.jpg": "cat", "3.jpg": None, "a/2.jpg": "dog"}
    assert source.items["score"].to_pylist() == [0.5, 1.0, None]
    where = f"{folder}/metadata.{kind}"
    assert source.notes == (
        f"the labels are the column label of {where}; --label chooses another: score; --label folder takes the class folders",
        "1 image without a label, such as 3",
    )
    options = BuildOptions(source=SourceOptions(fields=parse_fields(keep="score")))
    result = build(str(folder), open_store(str(tmp_path / "out")), options)
    assert result.manifest.classes == ["cat", "dog"]
    assert verify(open_dataset(str(tmp_path / "out"))) == []


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [
        ("3.0,,1", "class", ["3", None, "1"]),  # as pandas writes whole numbers with a gap
        ("0.5,,2", "numbers", [[0.5], None, [2.0]]),
        ("cat,,3b", "class", ["cat", None, "3b"]),
        ('"[0, 2]",,[1]', "classes", [["0", "2"], None, ["1"]]),
    ],
)
def test_labels_of_a_csv_file(column: str, kind: str, expected: list[Any], tmp_path: Path) -> None:
    folder = tree(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    first, second, third = column.replace('"[0, 2]"', '"[0# 2]"').split(",")
    lines = ["file_name,label", f"1.jpg,{first}", f"2.jpg,{second}", f"3.jpg,{third}"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines).replace("#", ","))
    source = opened(folder)
    assert source.kind == kind
    assert list(labels(source).values()) == expected


def test_semicolons_and_long_texts_in_a_csv_file(tmp_path: Path) -> None:
    folder = tree(tmp_path, "1.jpg", "2.jpg")
    text = "x" * 200_000
    (tmp_path / "metadata.csv").write_text(f'file_name;class;caption\n1.jpg;bee;"{text};\n"\n2.jpg;ant;y\n')
    source = opened(folder, keep="caption")
    assert labels(source) == {"1.jpg": "bee", "2.jpg": "ant"}
    assert source.items["caption"].to_pylist() == [f"{text};", "y"]


def test_metadata_files_in_each_folder_and_a_deeper_one_counts(tmp_path: Path) -> None:
    folder = tree(tmp_path, "a/1.jpg", "a/2.jpg", "b/c/3.jpg")
    write_metadata(
        folder, "csv", [{"file_name": "a/1.jpg", "label": 7}, {"file_name": "b/c/3.jpg", "label": 8}]
    )
    write_metadata(
        folder / "a", "jsonl", [{"file_name": "./1.jpg", "label": 0}, {"file_name": "2.jpg", "label": 1}]
    )
    source = opened(folder)
    assert labels(source) == {"a/1.jpg": "0", "a/2.jpg": "1", "b/c/3.jpg": "8"}
    write_metadata(folder / "a", "csv", [{"file_name": "1.jpg", "label": 0}])
    with pytest.raises(UserError, match="two metadata files in its folder"):
        opened(folder)


def test_class_folders_or_metadata_can_be_chosen(tmp_path: Path) -> None:
    folder = tree(tmp_path, "cat/1.jpg", "dog/2.jpg")
    write_metadata(
        folder, "csv", [{"file_name": f"{name}.jpg", "label": 5, "age": 1} for name in ("cat/1", "dog/2")]
    )
    assert set(labels(opened(folder)).values()) == {"5"}
    assert list(labels(opened(folder, label="folder")).values()) == ["cat", "dog"]
    assert list(labels(opened(folder, label="age")).values()) == ["1", "1"]
    assert list(labels(opened(folder, label="none")).values()) == [None, None]
    kept = opened(folder, label="folder", keep="age")
    assert (list(labels(kept).values()), kept.items["age"].to_pylist()) == (["cat", "dog"], [1, 1])


def test_metadata_without_labels_leaves_the_class_folders(tmp_path: Path) -> None:
    folder = tree(tmp_path, "cat/1.jpg", "dog/2.jpg")
    write_metadata(
        folder, "csv", [{"file_name": "cat/1.jpg", "text": "a"}, {"file_name": "dog/2.jpg", "text": "b"}]
    )
    source = opened(folder)
    assert list(labels(source).values()) == ["cat", "dog"]
    assert source.notes == (
        f"no column of {folder}/metadata.csv is called a label; --label chooses one: text; the labels are the class folders",
    )
    (folder / "metadata.csv").write_text("id,text\n1,2\n")
    source = opened(folder)
    assert list(labels(source).values()) == ["cat", "dog"]
    assert "metadata.csv is not used, because it has no column file_name" in source.notes[0]


def test_one_folder_of_images_beside_metadata_is_no_class(tmp_path: Path) -> None:
    folder = tree(tmp_path, "images/1.jpg", "images/2.jpg")
    write_metadata(folder, "csv", [{"file_name": "images/1.jpg", "text": "a"}])
    assert opened(folder).classes == []


def test_several_columns_of_labels_are_refused_with_the_choice(tmp_path: Path) -> None:
    folder = tree(tmp_path, "1.jpg")
    write_metadata(folder, "csv", [{"file_name": "1.jpg", "label": 1, "class": 2}])
    with pytest.raises(UserError, match=r"choose one with --label: label, class \(or --label none\)"):
        opened(folder)
    assert labels(opened(folder, label="class")) == {"1.jpg": "2"}


def test_rows_and_images_that_do_not_fit_are_counted_or_refused(tmp_path: Path) -> None:
    folder = tree(tmp_path, "1.jpg", "2.jpg")
    rows = [{"file_name": "1.jpg", "label": 0}, {"file_name": "gone.jpg", "label": 0}]
    write_metadata(folder, "csv", rows)
    notes = opened(folder).notes
    assert "1 row of metadata.csv without an image file, such as gone.jpg" in notes
    assert "1 image without a row in metadata.csv, such as 2.jpg" in notes
    write_metadata(folder, "csv", rows[1:])
    with pytest.raises(
        UserError, match=r"none of its 1 row names an image of the folder, such as 'gone\.jpg'"
    ):
        opened(folder)
    (folder / "metadata.csv").write_text("picture,label\n1.jpg,4\n2.jpg,5\n")
    with pytest.raises(
        UserError, match=r"no column file_name: choose .* --image.*--label none \(it has picture, label\)"
    ):
        opened(folder)
    assert labels(opened(folder, image="picture")) == {"1.jpg": "4", "2.jpg": "5"}


def test_two_rows_of_an_image(tmp_path: Path) -> None:
    folder = tree(tmp_path, "1.jpg", "2.jpg")
    rows = [("1.jpg", "a"), ("2.jpg", "b"), ("1.jpg", "c"), ("2.jpg", "b")]
    write_metadata(folder, "csv", [{"file_name": name, "label": label} for name, label in rows])
    with pytest.raises(
        UserError, match=r"two rows of 1\.jpg with different labels \(a and c\).*--label-kind classes"
    ):
        opened(folder)
    assert labels(opened(folder, kind="classes")) == {"1.jpg": ["a", "c"], "2.jpg": ["b"]}


def test_names_as_windows_writes_them(tmp_path: Path) -> None:
    folder = tree(tmp_path, "a/1.jpg", "b/2.jpg")
    write_metadata(folder, "jsonl", [{"file_name": f"{name}.jpg", "label": "x"} for name in ("a\\1", "b\\2")])
    assert set(labels(opened(folder)).values()) == {"x"}


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("metadata.jsonl", b'{"file_name": "1.jpg"}\nwhat', r"metadata\.jsonl: line 2 is not a JSON object"),
        ("metadata.csv", b"file_name,label\n1.jpg,\xff\n", "is not UTF-8"),
        ("metadata.parquet", b"PAR1", "is damaged"),
        ("metadata.csv", b"", "has no column file_name"),
        (
            "metadata.jsonl",
            b'{"file_name": "1.jpg", "label": {"a": 1}}',
            "row 0: .*label cannot be a label: it is an object",
        ),
    ],
)
def test_damaged_metadata_files(name: str, content: bytes, match: str, tmp_path: Path) -> None:
    folder = tree(tmp_path, "1.jpg")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=match):
        opened(folder)


def test_options_for_columns_without_a_metadata_file(tmp_path: Path) -> None:
    folder = tree(tmp_path, "cat/1.jpg", "dog/2.jpg", "0.jpg")
    with pytest.raises(UserError, match=r"--label age: .* no metadata file with columns"):
        opened(folder, label="age")
    with pytest.raises(UserError, match="--label folder takes them without a label, and --label none"):
        opened(folder)
    assert labels(opened(folder, label="folder")) == {"0.jpg": None, "cat/1.jpg": "cat", "dog/2.jpg": "dog"}
    assert set(labels(opened(folder, label="none")).values()) == {None}
    with pytest.raises(UserError, match="class folders give one class for each image"):
        opened(folder, label="folder", kind="numbers")
