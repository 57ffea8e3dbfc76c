"""All kinds of sources give the same samples, labels and bytes; an invalid source is a one-line error."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from pipeline.build import imagenet
from pipeline.build.build import build
from pipeline.build.image_table import Source, rows_of
from pipeline.build.shard_writer import BuildOptions
from pipeline.build.sources import open_source
from pipeline.build.synthetic import draw_scene
from pipeline.dataset.manifest import BUILDING
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.data.imagenet_files import add, parquet_files, train_tar, validation_tar
from tests.support.datasets import IMAGENET_SAMPLE, build_dataset

WNIDS = ["n01440764", "n01443537", "n03000684"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders: the ImageNet sample if there is one, otherwise three classes of four synthetic images."""
    folder = tmp_path_factory.mktemp("tree") / "train"
    if IMAGENET_SAMPLE:
        shutil.copytree(IMAGENET_SAMPLE, folder)
        return folder
    return drawn_tree(folder)


def drawn_tree(folder: Path) -> Path:
    for label, wnid in enumerate(WNIDS):
        (folder / wnid).mkdir(parents=True)
        for i in range(4):
            (folder / wnid / f"{wnid}_{i}.JPEG").write_bytes(draw_scene(0, i, label))
    return folder


def opened(url: object, tmp_path: Path, devkit: Path | None = None) -> Source:
    spool = open_store(str(tmp_path / "spool"))
    spool.write(BUILDING, b"{}")
    return open_source(str(url), lambda: spool, str(devkit) if devkit else None)


def samples(source: Source) -> dict[str, tuple[int, bytes]]:
    read = source.reader.open()
    return {item.key: (item.label, read(item)) for item in rows_of(source.items)}


def test_the_train_archive_equals_its_class_folders(tree: Path, tmp_path: Path) -> None:
    folder, archive = (
        opened(tree, tmp_path),
        opened(train_tar(tree, tmp_path / "ILSVRC2012_img_train.tar"), tmp_path),
    )
    assert archive.classes == folder.classes == sorted(folder.classes)
    assert samples(archive) == samples(folder)
    assert all(
        item.size == len(data)
        for item, (_, data) in zip(rows_of(archive.items), samples(archive).values(), strict=True)
    )


def test_the_train_archive_can_be_read_from_a_bucket(tmp_path: Path, s3: str) -> None:
    store = open_store(f"{s3}/archives")
    archive = train_tar(drawn_tree(tmp_path / "train"), tmp_path / "train.tar")
    store.write("train.tar", archive.read_bytes())
    assert samples(opened(store.describe("train.tar"), tmp_path)) == samples(opened(archive, tmp_path))


def test_the_validation_archive_with_its_devkit_equals_class_folders(tree: Path, tmp_path: Path) -> None:
    archive, devkit = validation_tar(tree, tmp_path)
    got, expected = opened(archive, tmp_path, devkit), opened(tmp_path / "tree", tmp_path)
    assert got.classes == expected.classes
    assert samples(got) == samples(expected)
    with pytest.raises(UserError, match=r"ILSVRC2012_devkit_t12\.tar\.gz: add --devkit"):
        opened(archive, tmp_path)
    (tmp_path / "wrong.tar.gz").write_bytes(b"what")
    with pytest.raises(UserError, match="is not ImageNet's devkit"):
        opened(archive, tmp_path, tmp_path / "wrong.tar.gz")
    with pytest.raises(UserError, match="no such file"):
        opened(archive, tmp_path, tmp_path / "nothing.tar.gz")


def test_parquet_files_give_the_same_samples(tree: Path, tmp_path: Path) -> None:
    got, expected = opened(parquet_files(tree, tmp_path / "hub"), tmp_path), opened(tree, tmp_path)
    assert got.classes == expected.classes
    assert samples(got) == samples(expected)
    assert samples(opened(tmp_path / "hub", tmp_path)) == samples(expected)


def test_imagenet_from_the_hub_with_class_names_in_words(tree: Path, tmp_path: Path) -> None:
    """The words are in the order of the wnids, and the dataset's classes are the wnids."""
    words = ["tench, Tinca tinca", *(f"word {i}" for i in range(1, 1000))]
    got = opened(parquet_files(tree, tmp_path / "hub", names=words), tmp_path)
    assert got.classes == list(imagenet.wnids())
    assert any(item.key.startswith("n01440764/") and item.label == 0 for item in rows_of(got.items))
    assert any("ImageNet has 1,281,167" in line for line in got.notes)


def test_damaged_parquet_files(tree: Path, tmp_path: Path) -> None:
    parquet_files(tree, tmp_path / "hub", files=1)
    path = next((tmp_path / "hub").iterdir())
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    broken(tmp_path, "is damaged or not a Parquet file", path)
    path.write_bytes(sound[:2000] + bytes(200_000) + sound[202_000:])
    broken(tmp_path, "is damaged", path)


def test_existing_webdataset_tars_and_datasets_can_be_a_source(tree: Path, tmp_path: Path) -> None:
    dataset = build_dataset(str(tree), str(tmp_path / "dataset"), 1 << 20)
    expected = samples(opened(tree, tmp_path))
    again = opened(tmp_path / "dataset", tmp_path)
    assert samples(again) == expected
    assert again.classes == dataset.manifest.classes
    for name in ("manifest.json", "shards.parquet"):
        (tmp_path / "dataset" / name).unlink()
    foreign = opened(tmp_path / "dataset", tmp_path)
    assert samples(foreign) == expected
    assert foreign.classes == [str(i) for i in range(len(again.classes))]  # tars do not store class names
    one = opened(tmp_path / "dataset" / "shard-000000.tar", tmp_path)
    assert samples(one).items() <= expected.items()
    assert samples(opened(f"{tmp_path}/dataset/shard-*.tar", tmp_path)) == expected


def test_every_source_gives_the_same_dataset_in_the_same_order(tree: Path, tmp_path: Path) -> None:
    """The shuffle depends on the order of the source, and archives keep the order of the class folders."""
    built = [
        build_dataset(str(source), str(tmp_path / name), 1 << 20).fingerprint
        for name, source in [("a", tree), ("b", train_tar(tree, tmp_path / "train.tar"))]
    ]
    assert built[0] == built[1]


# ---- invalid sources --------------------------------------------------------------------------------------------


def broken(tmp_path: Path, match: str, source: object = None) -> None:
    with pytest.raises(UserError, match=match) as refusal:
        opened(source or tmp_path / "x.tar", tmp_path)
    assert "\n" not in str(refusal.value)


def test_damaged_archives(tree: Path, tmp_path: Path) -> None:
    sound = train_tar(tree, tmp_path / "x.tar").read_bytes()
    for cut, match in [
        (len(sound) // 2, "is cut off at byte"),
        (len(sound) - 10240, "is cut off at byte"),
        (0, "is empty"),
    ]:
        (tmp_path / "x.tar").write_bytes(sound[:cut])
        broken(tmp_path, match)
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + sound)
    broken(tmp_path, "is not a tar")
    broken(tmp_path, "compressed", tmp_path / "x.tar.gz")
    broken(tmp_path, "no such file", tmp_path / "nothing.tar")


SCENE = draw_scene(0, 0, 0)


def class_tar(*names: str) -> bytes:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        for name in names:
            add(tar, name, SCENE)
    return inner.getvalue()


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"n01440764.tar": class_tar()}, r"n01440764\.tar.*no images in it"),
        ({"n01440764.tar": class_tar("a.JPEG"), "readme": b"hi"}, "readme in it beside the class tars"),
        ({"n01440764.tar": class_tar("\udcff.JPEG")}, "not printable UTF-8"),
        ({"n01440764.tar": class_tar("a.JPEG")[:5000]}, "is cut off at byte"),
        ({"ILSVRC2012_val_00000001.JPEG": b"", "ILSVRC2012_val_00000002.JPEG": b""}, "add --devkit"),
        ({}, "no files in it"),
    ],
)
def test_odd_archives(tmp_path: Path, members: dict[str, bytes], match: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    broken(tmp_path, match)


def test_images_of_a_class_tar_that_differ_only_in_the_extension(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "n01440764.tar", class_tar("a.JPEG", "._a.JPEG", "a.png"))
    assert sorted(samples(opened(tmp_path / "x.tar", tmp_path))) == ["n01440764/a", "n01440764/a_2"]


def test_missing_imagenet_classes_are_a_warning_not_an_error(tmp_path: Path) -> None:
    names = list(imagenet.wnids())
    assert len(names) == 1000
    assert names == sorted(names)
    assert imagenet.find_oddities(["cat", "dog"], [1, 2]) == ()
    assert imagenet.find_oddities(names, [50] * 1000) == ()
    full = [1281] * 999 + [1281167 - 999 * 1281]
    assert "without the usual 732 to 1300" in imagenet.find_oddities(names, full)[0]
    assert "1,281,167" in imagenet.find_oddities(names, [1281] * 1000)[0]
    (lines,) = imagenet.find_oddities(names[1:], [50] * 999)
    assert "1 of ImageNet's 1000 classes missing (n01440764)" in lines
    assert "n99999999" in imagenet.find_oddities(["n99999999"], [1])[0]


def test_a_missing_class_tar_is_a_warning(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for wnid in imagenet.wnids()[1:]:
            add(tar, f"{wnid}.tar", class_tar(f"{wnid}_1.JPEG"))
    (line,) = opened(tmp_path / "x.tar", tmp_path).notes
    assert "1 of ImageNet's 1000 classes missing (n01440764)" in line


def test_odd_folders(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "empty").mkdir(parents=True)
    shutil.copytree(tree / min(p.name for p in tree.iterdir()), tmp_path / "images" / "full")
    broken(tmp_path, "class folder empty has no images", tmp_path / "images")
    (tmp_path / "tables").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "tables" / f"{split}-0-of-1.parquet").write_bytes(b"PAR1")
    broken(tmp_path, "several splits", tmp_path / "tables")
    broken(tmp_path, "is damaged or not a Parquet file", f"{tmp_path}/tables/train-*")
    broken(tmp_path, "no file matches this pattern", f"{tmp_path}/tables/test-*")


def test_source_and_destination_are_not_the_same(tree: Path, tmp_path: Path) -> None:
    pattern = parquet_files(tree, tmp_path / "hub")
    for source, dest in [
        (tmp_path / "hub", tmp_path / "hub"),
        (tmp_path / "hub", tmp_path / "hub" / "shards"),
    ]:
        with pytest.raises(UserError, match="inside the source"):
            build(str(source), open_store(str(dest)), BuildOptions())
    with pytest.raises(UserError, match="is inside the destination"):
        build(pattern, open_store(str(tmp_path / "hub")), BuildOptions())
