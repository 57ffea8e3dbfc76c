"""Class folders as people have them: hidden folders, splits, empty classes, odd names. Nothing is misread in silence."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.build.build import BuildResult, build
from pipeline.build.file_names import file_split, is_image, split_of
from pipeline.build.image_table import ITEMS, RangeReader, Source, SourceOptions, make_source, rows_of
from pipeline.build.shard_writer import BuildOptions
from pipeline.build.sources import open_source
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.fields import parse_fields
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.data.pictures import tree


def opened(folder: Path, options: SourceOptions | None = None) -> Source:
    return open_source(str(folder), lambda: open_store(str(folder)), options=options)


def labels(source: Source) -> dict[str, str]:
    """File → class name."""
    return {item.file: source.classes[item.label] for item in rows_of(source.items)}


def built(folder: Path, to: Path, **options: object) -> BuildResult:
    return build(str(folder), open_store(str(to)), BuildOptions(source=SourceOptions(**options)))


def test_an_option_for_tars_is_refused(tmp_path: Path) -> None:
    folder = tree(tmp_path, "cat/1.jpg")
    with pytest.raises(UserError, match="--split-at is for the names of files in tars"):
        opened(folder, SourceOptions(fields=parse_fields(None, None, split_at="last-dot")))


# ---- hidden and system files ------------------------------------------------------------------------------------


def test_hidden_and_system_folders_are_no_classes_and_have_no_images(tmp_path: Path) -> None:
    folder = tree(
        tmp_path / "in",
        *("cat/1.jpg", "cat/.ipynb_checkpoints/1.jpg", "cat/._1.jpg", "dog/1.jpg", "dog/@eaDir/1.jpg/SM.jpg"),
        *(".ipynb_checkpoints/2.jpg", "__MACOSX/cat/._1.jpg", "__MACOSX/x.jpg", "lost+found/3.jpg"),
        *("cat/.DS_Store", "Thumbs.db", "@eaDir/4.jpg", "dog/Thumbs.db", "$RECYCLE.BIN/5.jpg"),
    )
    source = opened(folder)
    assert labels(source) == {"cat/1.jpg": "cat", "dog/1.jpg": "dog"}
    assert source.notes == ("ignored 9 hidden images, such as $RECYCLE.BIN/5.jpg",)


@given(st.lists(st.sampled_from(["cat", ".git", "__MACOSX", "a.b", "LOST+FOUND", "@eaDir"]), min_size=1))
def test_a_path_with_anything_hidden_in_it_is_no_image(folders: list[str]) -> None:
    assert is_image("/".join([*folders, "1.jpg"])) == (set(folders) <= {"cat", "a.b"})


def test_other_files_are_counted_by_extension(tmp_path: Path) -> None:
    names = [f"cat/{i}.txt" for i in range(10)] + ["cat/1.heic", "cat/2.HEIC", "cat/README", "cat/1.jpg"]
    assert opened(tree(tmp_path, *names)).notes == (
        "ignored 13 other files: 10 .txt, 2 .heic, 1 without an extension",
    )
    (tmp_path / "cat" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"no images in it .*it has 10 \.txt, 2 \.heic"):
        opened(tmp_path)


def test_all_extensions_of_jpeg_png_and_webp_are_taken_in_any_case_and_depth(tmp_path: Path) -> None:
    names = ["cat/1.jpg", "cat/a/2.JPEG", "cat/a/b/c/3.JfiF", "cat/4.jpe", "dog/5.PNG", "dog/x/6.WebP"]
    source = opened(tree(tmp_path, *names))
    assert labels(source) == {name: name[:3] for name in names}


# ---- splits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "val"),
        ("Training", "TEST"),
        ("train", "validation", "cat"),
        ("train",),
        ("train2017", "val2017"),
    ],
)
def test_splits_in_one_tree_are_refused_with_the_way_out(folders: tuple[str, ...], tmp_path: Path) -> None:
    tree(tmp_path, *(f"{folder}/cat/1.jpg" for folder in folders))
    first = sorted(folder for folder in folders if folder != "cat")[0]
    with pytest.raises(
        UserError, match=f"give one of them, such as {tmp_path}/{first}.* --splits merge.* --splits classes"
    ):
        opened(tmp_path)


def test_splits_can_be_classes_or_merged(tmp_path: Path) -> None:
    folder = tree(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg")
    classes = opened(folder, SourceOptions(splits="classes"))
    assert labels(classes) == {
        "train/cat/1.jpg": "train",
        "train/dog/1.jpg": "train",
        "val/cat/1.jpg": "val",
    }
    merged = opened(folder, SourceOptions(splits="merge"))
    assert labels(merged) == {"train/cat/1.jpg": "cat", "train/dog/1.jpg": "dog", "val/cat/1.jpg": "cat"}
    assert [item.key for item in rows_of(merged.items)] == ["train/cat/1", "train/dog/1", "val/cat/1"]


def test_a_class_called_train_beside_others_is_a_class(tmp_path: Path) -> None:
    """COCO and Pascal VOC have such a class."""
    assert opened(tree(tmp_path, "bus/1.jpg", "car/1.jpg", "train/1.jpg")).classes == ["bus", "car", "train"]
    assert [split_of(name) for name in ("trains", "trainer", "value", "tests", "devil")] == [None] * 5


def test_a_folder_too_high_in_the_tree_is_noted(tmp_path: Path) -> None:
    folder = tree(tmp_path / "a", "images/cat/1.jpg", "images/dog/1.jpg")
    assert opened(folder).notes == (
        f"all images are in one class, images. To make the folders in it the classes (cat, dog), give {folder}/images",
    )
    folder = tree(
        tmp_path / "b", "bottle/train/good/1.jpg", "bottle/test/bad/1.jpg", "cable/train/good/1.jpg"
    )
    assert opened(folder).notes == (
        "the class folders have test/ and train/ in them: the images of all of these are taken",
    )


def test_class_folders_that_are_probably_one_are_noted(tmp_path: Path) -> None:
    source = opened(tree(tmp_path, "Cat/1.jpg", "cat/2.jpg", "dog/3.jpg"))
    assert source.classes == ["Cat", "cat", "dog"]
    assert source.notes == (
        "the class folders 'Cat' and 'cat' differ only in case, accents' encoding or spaces: they are two classes",
    )


def test_the_split_of_a_file(tmp_path: Path) -> None:
    names = {
        "train-00000-of-00002.parquet": ("train", "train-*"),
        "data/validation-00000-of-00001.parquet": ("val", "data/validation-*"),
        "a/test/0000.parquet": ("test", "a/test/*"),
        "unsupervised-00000-of-00001.parquet": ("unsupervised", "unsupervised-*"),
        "train.parquet": ("train", "train.*"),
        "val_07.tar": ("val", "val_*"),
        "shard-000000.tar": ("", "shard-*"),
        "00000.tar": ("", "00000.*"),
    }
    assert {name: file_split(name) for name in names} == names


def test_tars_of_several_splits_are_noted(tmp_path: Path) -> None:
    for name in ("train", "val"):
        images = tree(tmp_path / name, *(f"{name}{i}.jpg" for i in range(2)))
        built(images, tmp_path / f"{name}-out")
        (tmp_path / "tars").mkdir(exist_ok=True)
        (tmp_path / f"{name}-out" / "shard-000000.tar").rename(tmp_path / "tars" / f"{name}-000000.tar")
    (note,) = opened(tmp_path / "tars").notes
    assert (
        note == f"the tars are of several splits (train, val); '{tmp_path}/tars/train-*' selects one of them"
    )
    assert opened(tmp_path / "tars" / "train-*").notes == ()


# ---- empty classes ----------------------------------------------------------------------------------------------


def test_an_empty_class_folder_is_refused_or_kept(tmp_path: Path) -> None:
    folder = tree(tmp_path, "ant/1.jpg", "bee/1.heic", "cat/1.jpg")
    (tmp_path / ".cache").mkdir()
    with pytest.raises(
        UserError, match=r"class folder bee has no images in it \(it has 1 \.heic\).*--allow-empty"
    ):
        opened(folder)
    source = opened(folder, SourceOptions(allow_empty_classes=True))
    assert source.classes == ["ant", "bee", "cat"]
    assert labels(source) == {"ant/1.jpg": "ant", "cat/1.jpg": "cat"}


def test_a_class_whose_images_were_all_left_out_is_told(tmp_path: Path) -> None:
    folder = tree(tmp_path / "in", "ant/1.jpg", "bee/1.jpg", "bee/2.jpg", "cat/1.jpg", "cat/2.jpg")
    for name in ("bee/1.jpg", "bee/2.jpg", "cat/1.jpg"):
        (folder / name).write_bytes(b"no image")
    result = built(folder, tmp_path / "out")
    assert result.lost_classes == ["bee"]
    assert result.manifest.classes == ["ant", "bee", "cat"]  # the numbers stay what they are
    assert result.manifest.built["classes_without_images"] == "bee"
    dataset = open_dataset(str(tmp_path / "out"))
    assert sorted(dataset.locate([0, 1]).label.tolist()) == [0, 2]


# ---- equal keys -------------------------------------------------------------------------------------------------


def test_images_that_differ_only_in_the_extension_are_all_taken(tmp_path: Path) -> None:
    folder = tree(tmp_path / "in", "c/1.JPG", "c/1.jpg", "c/1.png", "c/1_2.jpg", "d/a.b.jpg", "d/a_b.jpg")
    source = opened(folder)
    assert {item.file: item.key for item in rows_of(source.items)} == {
        "c/1.JPG": "c/1",
        "c/1.jpg": "c/1_3",
        "c/1.png": "c/1_4",
        "c/1_2.jpg": "c/1_2",
        "d/a.b.jpg": "d/a_b",
        "d/a_b.jpg": "d/a_b_2",
    }
    assert source.notes == (
        "3 images got a number at the end of the key, because another image has the same: c/1.jpg has the key c/1_3",
    )
    assert built(folder, tmp_path / "a").manifest == built(folder, tmp_path / "b").manifest
    assert open_dataset(str(tmp_path / "a")).samples == 6
    assert verify(open_dataset(str(tmp_path / "a"))) == []


@given(st.lists(st.sampled_from(["a", "a_2", "a_2_2", "a_3", "b"])))
def test_keys_become_distinct_and_the_first_of_each_stays(keys: list[str]) -> None:
    n = len(keys)
    columns = {
        "key": keys,
        "label": [-1] * n,
        "file": [str(i) for i in range(n)],
        "offset": [0] * n,
        "size": [1] * n,
    }
    got = make_source("x", [], RangeReader("."), pa.table(columns, schema=ITEMS)).items["key"].to_pylist()
    assert len(set(got)) == n
    firsts = {key: keys.index(key) for key in keys}
    assert all(got[place] == key for key, place in firsts.items())
    assert all(new.startswith(old) for new, old in zip(got, keys, strict=True))


# ---- links ------------------------------------------------------------------------------------------------------


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    folder = tree(tmp_path, "a/1.jpg", "b/2.jpg")
    (folder / "a" / "to_b").symlink_to(folder / "b")
    (folder / "b" / "to_a").symlink_to(folder / "a")
    (folder / "b" / "self").symlink_to(folder / "b")
    (folder / "b" / "top").symlink_to(folder)
    assert labels(opened(folder)) == {
        "a/1.jpg": "a",
        "a/to_b/2.jpg": "a",
        "b/2.jpg": "b",
        "b/to_a/1.jpg": "b",
    }


# ---- builds that were interrupted -------------------------------------------------------------------------------


def test_building_json_of_earlier_versions_stays_equal(tmp_path: Path) -> None:
    """So their interrupted builds are resumed. Newer options are in it only where they are used."""
    store = open_store(str(tmp_path / "out"))

    def die(images: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("synthetic:?count=4", store, BuildOptions(), on_plan=die)
    assert store.read("building.json").decode() == EARLIER
    options = SourceOptions("merge", True, parse_fields(label="age"))
    changes = options.changes()
    assert list(changes) == ["splits", "allow_empty_classes", "fields"]
    assert changes["fields"]["label"] == "age"


EARLIER = """{
  "source": "synthetic:?count=4",
  "shard_bytes": 134217728,
  "seed": 0,
  "check": "decode",
  "changes": {
    "shorter_side": null,
    "longer_side": null,
    "rgb_jpeg": false,
    "quality": 90
  },
  "drop_duplicates": false
}
"""
