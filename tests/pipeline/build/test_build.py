"""Builds write plain WebDataset shards, are reproducible and can be resumed."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.build.build import build
from pipeline.build.shard_writer import BuildOptions, Receipt, ShardJob, write_shard
from pipeline.build.sources import open_source
from pipeline.build.synthetic import draw_scene
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.data.imagenet_files import parquet_files, train_tar
from tests.support.datasets import build_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three class folders with two images each, one of them a PNG."""
    for label, name in enumerate(["ant", "bee", "cat"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "images" / name / f"{name}.{i}.JPEG").write_bytes(draw_scene(0, 2 * label + i, label))
    Image.open(io.BytesIO(draw_scene(1, 0, 0))).save(tmp_path / "images" / "ant" / "drawn.png")
    return tmp_path / "images"


def test_webdataset_alone_reads_every_image_and_label(folder: Path, tmp_path: Path) -> None:
    dataset = build_dataset(str(folder), str(tmp_path / "out"), shard_bytes=150_000)
    tars = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(tars) == dataset.manifest.shards > 1
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        image = sample.get("jpg") or sample["png"]
        found[sample["__key__"]] = (image, int(sample["cls"]))
    expected = {
        f"{path.parent.name}/{path.stem.replace('.', '_')}": (
            path.read_bytes(),
            ["ant", "bee", "cat"].index(path.parent.name),
        )
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert found == expected
    assert dataset.manifest.classes == ["ant", "bee", "cat"]


def test_the_index_locates_each_image(scenes: Dataset) -> None:
    located = scenes.locate(np.arange(scenes.samples))
    for i, key in enumerate(scenes.keys(np.arange(scenes.samples))):
        name = scenes.shard_name(int(located.shard[i]))
        image = scenes.store.read_range(name, int(located.offset[i]), int(located.size[i]))
        with Image.open(io.BytesIO(image)) as opened:
            assert opened.size == (located.width[i], located.height[i])
        assert image == draw_scene(0, int(key.split("/")[1]), int(located.label[i]))


def test_the_same_source_and_seed_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_dataset(str(folder), str(tmp_path / name), shard_bytes=150_000)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path
    other = build_dataset(str(folder), str(tmp_path / "c"), seed=1)
    assert other.fingerprint != open_dataset(str(tmp_path / "a")).fingerprint


def test_a_copy_keeps_its_fingerprint(scenes: Dataset, tmp_path: Path) -> None:
    shutil.copytree(scenes.store.root, tmp_path / "copy")
    copy = open_dataset(str(tmp_path / "copy"))
    assert copy.fingerprint == scenes.fingerprint
    assert verify(copy) == []


def test_images_outside_class_folders_have_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(draw_scene(0, i, 0))
    dataset = build_dataset(str(tmp_path), str(tmp_path.parent / "flat"))
    assert dataset.locate([0, 1, 2]).label.tolist() == [-1, -1, -1]
    assert dataset.manifest.classes == []
    shutil.rmtree(tmp_path.parent / "flat")


def test_a_truncated_image_is_skipped_and_listed_or_stops_a_strict_build(
    folder: Path, tmp_path: Path
) -> None:
    victim = folder / "bee" / "bee.0.JPEG"
    victim.write_bytes(victim.read_bytes()[:5000])
    (folder / "cat" / "not_an_image.jpg").write_text("hello")
    built = build(str(folder), open_store(str(tmp_path / "out")), BuildOptions())
    assert built.manifest.samples == 6
    assert sorted(line.partition(":")[0] for line in built.skipped) == [
        "bee/bee.0.JPEG",
        "cat/not_an_image.jpg",
    ]
    with pytest.raises(UserError, match=r"bee\.0\.JPEG|not_an_image"):
        build(str(folder), open_store(str(tmp_path / "strict")), BuildOptions(strict=True))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_killed_build_is_not_a_dataset_and_is_resumed(tmp_path: Path, at: int) -> None:
    """The build is killed after shard `at`: once into an empty folder, and once while it replaces a dataset."""
    source, options = "synthetic:?count=24&classes=4", BuildOptions(shard_bytes=300_000)
    store = open_store(str(tmp_path / "out"))

    def die(receipt: Receipt, kept: bool) -> None:
        if receipt.name == f"shard-{at:06d}.tar":
            raise Killed

    for overwrite in (False, True):
        with pytest.raises(Killed):
            build(source, store, options, overwrite=overwrite, on_shard=die)
        with pytest.raises(UserError, match="unfinished build"):
            open_dataset(store.url)
        with pytest.raises(UserError, match="with other options"):
            build(source, store, BuildOptions(shard_bytes=300_000, seed=1))
        assert build(source, store, options).kept == at + 1
        assert verify(open_dataset(store.url)) == []
    clean = build_dataset(source, str(tmp_path / "clean"), 300_000)
    assert clean.manifest.shards > 3
    names = [sorted(open_store(d).names()) for d in (store.url, clean.store.url)]
    assert names[0] == names[1]  # the killed builds left no files behind


def test_leftover_tasks_of_a_killed_build_write_nothing_into_the_next(tmp_path: Path) -> None:
    """Tasks may run on for a moment after their command was killed."""
    store = open_store(str(tmp_path / "out"))
    leftover: list[ShardJob] = []

    def killed(function: Callable[[Any], Any], inputs: Iterable[Any]) -> Iterator[Any]:
        leftover.extend(inputs)
        raise KeyboardInterrupt

    def while_they_run(function: Callable[[Any], Any], inputs: Iterable[Any]) -> Iterator[Any]:
        for job in leftover:
            with pytest.raises(UserError, match="another build has started there"):
                write_shard(job)
        return map(function, inputs)

    with pytest.raises(KeyboardInterrupt):
        build("synthetic:?count=30", store, BuildOptions(), run=killed)
    build("synthetic:?count=20", store, BuildOptions(), overwrite=True, run=while_they_run)
    with pytest.raises(UserError):
        write_shard(leftover[0])
    assert list(verify(open_dataset(store.url))) == []
    assert open_dataset(store.url).samples == 20


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_killed_build_of_an_archive_is_resumed(kind: str, tmp_path: Path) -> None:
    for label, wnid in enumerate(["n01440764", "n01443537"]):
        (tmp_path / "tree" / wnid).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "tree" / wnid / f"{wnid}_{i}.JPEG").write_bytes(draw_scene(0, i, label))
    if kind == "tar":
        source = str(train_tar(tmp_path / "tree", tmp_path / "train.tar"))
    else:
        source = parquet_files(tmp_path / "tree", tmp_path / "hub")
    store, options = open_store(str(tmp_path / "out")), BuildOptions(shard_bytes=300_000)

    def die(receipt: Receipt, kept: bool) -> None:
        if receipt.name == "shard-000001.tar":
            raise Killed

    with pytest.raises(Killed):
        build(source, store, options, on_shard=die)
    parts = {path: path.stat().st_ino for path in (tmp_path / "out" / "building").glob("part-*")}
    assert bool(parts) == (kind == "parquet")

    def check_parts(receipt: Receipt, kept: bool) -> None:
        assert all(path.stat().st_ino == number for path, number in parts.items())

    assert build(source, store, options, on_shard=check_parts).kept == 2
    clean = build_dataset(source, str(tmp_path / "clean"), 300_000)
    assert open_dataset(store.url).fingerprint == clean.fingerprint
    assert sorted(store.names()) == sorted(clean.store.names())


def test_a_shard_damaged_after_it_was_finished_is_rewritten(tmp_path: Path) -> None:
    source, options = "synthetic:?count=24&classes=4", BuildOptions(shard_bytes=300_000)
    store = open_store(str(tmp_path / "out"))

    def die(receipt: Receipt, kept: bool) -> None:
        if receipt.name == "shard-000003.tar":
            raise Killed

    with pytest.raises(Killed):
        build(source, store, options, on_shard=die)
    damaged = tmp_path / "out" / "shard-000001.tar"
    damaged.write_bytes(damaged.read_bytes().replace(b"square", b"sqqare"))
    (tmp_path / "out" / "index" / "shard-000002.parquet").write_bytes(b"")
    (tmp_path / "out" / "building" / "shard-000003.json").write_bytes(b"{")
    assert build(source, store, options).kept == 1
    assert verify(open_dataset(store.url)) == []


def test_duplicates_are_listed_and_dropped_on_request(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "ant" / "ant.0.JPEG", folder / "bee" / "again.JPEG")
    shutil.copy(folder / "ant" / "ant.0.JPEG", folder / "cat" / "again.JPEG")
    built = build(str(folder), open_store(str(tmp_path / "out")), BuildOptions(shard_bytes=150_000))
    assert built.manifest.samples == 9
    assert len(built.duplicates) == 2
    assert all("again" in line or "ant/ant_0" in line for line in built.duplicates)
    options = BuildOptions(shard_bytes=150_000, drop_duplicates=True)
    built = build(str(folder), open_store(str(tmp_path / "dropped")), options)
    assert built.duplicates == [f"{c}/again.JPEG is the same as ant/ant.0.JPEG" for c in ("bee", "cat")]
    assert built.manifest.samples == 7
    assert built.manifest.built["duplicates_dropped"] == 2


def test_a_build_killed_during_clean_up_is_not_repeated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, options = open_store(str(tmp_path / "out")), BuildOptions(shard_bytes=150_000)

    def die(_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.build.build.remove_build_files", die)
        with pytest.raises(Killed):
            build(str(folder), store, options)
    written = {
        name: (tmp_path / "out" / name).stat().st_ino for name in store.names() if name.endswith(".tar")
    }
    build(str(folder), store, options)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in written} == written
    assert "building" not in " ".join(store.names())
    assert verify(open_dataset(store.url)) == []


def test_a_failed_strict_build_can_be_resumed_without_strict(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "not_an_image.jpg").write_text("hello")
    store = open_store(str(tmp_path / "out"))
    with pytest.raises(UserError, match="not_an_image"):
        build(str(folder), store, BuildOptions(shard_bytes=100_000, strict=True))
    assert build(str(folder), store, BuildOptions(shard_bytes=100_000)).skipped
    with pytest.raises(UserError, match="already has a dataset"):
        build(str(folder), store, BuildOptions(shard_bytes=100_000))


def test_nothing_is_built_over_its_own_source(tmp_path: Path) -> None:
    dataset = build_dataset("synthetic:?count=8", str(tmp_path / "ds"), 100_000)
    (tmp_path / "link").symlink_to(tmp_path / "ds")
    before = sorted(dataset.store.names())
    for source in ("ds", "ds/shard-*.tar", "ds/shard-000000.tar", "link", "link/shard-000000.tar"):
        for dest in (tmp_path / "ds", tmp_path / "link", f"file://{tmp_path}/ds"):
            with pytest.raises(UserError, match="is inside the"):
                build(f"{tmp_path}/{source}", open_store(str(dest)), BuildOptions(), overwrite=True)
    assert sorted(dataset.store.names()) == before


def test_a_broken_link_is_an_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match=r"gone\.jpg is a broken symbolic link"):
        build(str(folder), open_store(str(tmp_path / "out")), BuildOptions())


def test_invalid_destinations_are_errors(folder: Path, scenes: Dataset, tmp_path: Path) -> None:
    def to(dest: Path | str) -> None:
        build(str(folder), open_store(str(dest)), BuildOptions())

    with pytest.raises(UserError, match="already has a dataset"):
        to(scenes.store.root)
    with pytest.raises(UserError, match="is inside the source"):
        to(folder / "shards")
    with pytest.raises(UserError, match="is inside the source"):
        to(folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty and not a dataset"):
        to(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "precious"


def test_an_invalid_source_does_not_replace_a_dataset(scenes: Dataset, tmp_path: Path) -> None:
    shutil.copytree(scenes.store.root, tmp_path / "copy")
    store = open_store(str(tmp_path / "copy"))
    before = {name: store.read(name) for name in store.names()}
    for source in (tmp_path / "nothing", tmp_path / "nothing.tar", "synthetic:?count=0"):
        with pytest.raises(UserError):
            build(str(source), store, BuildOptions(), overwrite=True)
    assert {name: store.read(name) for name in store.names()} == before


def test_invalid_sources_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(str(tmp_path / "nothing"), lambda: open_store(str(tmp_path)))
    with pytest.raises(UserError, match="no images in it"):
        open_source(str(tmp_path), lambda: open_store(str(tmp_path)))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(draw_scene(0, 0, 0))
    (tmp_path / "flat.jpg").write_bytes(draw_scene(0, 0, 0))
    with pytest.raises(UserError, match="both in class folders"):
        open_source(str(tmp_path), lambda: open_store(str(tmp_path)))
    for url in (
        "synthetic:?count=0",
        "synthetic:?count=²",
        "synthetic:?classes=99",
        "synthetic:?colour=red",
        "synthetic:?count=x",
    ):
        with pytest.raises(UserError, match="synthetic"):
            open_source(url, lambda: open_store(str(tmp_path)))


def test_linked_class_folders_are_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "bee").rename(tmp_path / "elsewhere" / "bee")
    (folder / "bee").symlink_to(tmp_path / "elsewhere" / "bee")
    (folder / "cat" / "loop").symlink_to(folder)
    source = open_source(str(folder), lambda: open_store(str(tmp_path)))
    assert source.classes == ["ant", "bee", "cat"]
    assert len(source.items) == 7


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_class_folder_without_read_permission_is_an_error(folder: Path) -> None:
    (folder / "bee").chmod(0)
    try:
        with pytest.raises(UserError, match="access denied"):
            open_source(str(folder), lambda: open_store(str(folder)))
    finally:
        (folder / "bee").chmod(0o755)


def test_replacing_a_dataset_keeps_other_files_and_subfolders(tmp_path: Path) -> None:
    outer, inner = tmp_path / "data", tmp_path / "data" / "held-out"
    build_dataset("synthetic:?count=6", str(outer), 100_000)
    build_dataset("synthetic:?count=4&seed=1", str(inner), 100_000)
    (outer / "README").write_text("mine")
    build_dataset("synthetic:?count=5", str(outer), 100_000, overwrite=True)
    assert verify(open_dataset(str(outer))) == verify(open_dataset(str(inner))) == []
    assert (outer / "README").read_text() == "mine"


def test_keys_longer_than_a_tar_header_field(tmp_path: Path) -> None:
    name = "x" * 180
    folder = tmp_path / "src" / ("d" * 120)
    folder.mkdir(parents=True)
    (folder / f"{name}.jpg").write_bytes(draw_scene(0, 0, 0))
    dataset = build_dataset(str(tmp_path / "src"), str(tmp_path / "out"))
    assert dataset.keys([0]) == [f"{'d' * 120}/{name}"]
    with tarfile.open(tmp_path / "out" / dataset.shard_name(0)) as tar:
        assert f"{'d' * 120}/{name}.jpg" in tar.getnames()
    assert verify(dataset) == []
