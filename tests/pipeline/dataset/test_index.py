"""Indexing existing WebDataset tars: the index is correct, few bytes are read, and invalid samples are reported."""

import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.build.build import build
from pipeline.build.shard_writer import BuildOptions
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.storage.store import Store, open_store
from tests.support.data.foreign_tars import (
    WEBP,
    Files,
    check,
    expected,
    index,
    noise,
    pack,
    picture,
    refused,
    samples,
)
from tests.support.datasets import build_dataset


def test_shards_of_webdatasets_own_writer(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=5, verbose=0) as writer:
        for i in range(12):
            writer.write({"__key__": f"a/b.c/{i:03d}", "jpg": picture(i), "cls": i % 4, "json": {"x": i}})
    found = index(tmp_path)
    assert (found.manifest.samples, found.manifest.shards, found.skipped.count) == (12, 3, 0)
    assert found.manifest.classes == ["0", "1", "2", "3"]
    dataset = open_dataset(str(tmp_path))
    assert check(dataset) == {f"a/b.c/{i:03d}": (picture(i), i % 4) for i in range(12)}
    tars = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    assert dataset.keys(np.arange(12)) == theirs
    assert not dataset.manifest.checksums
    assert verify(dataset) == []


@pytest.mark.parametrize("format", ["gnu", "posix", "ustar", "oldgnu"])
def test_gnu_tar_with_folders_dots_and_long_names(tmp_path: Path, format: str) -> None:
    deep = "d" * 60 if format == "ustar" else "d" * 120
    name = "x" * 90 if format == "ustar" else "x" * 180
    files = samples(["top", "n.01/b", "n.01/ü ñ", f"{deep}/{name}"])
    for file, data in files.items():
        (tmp_path / "src" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / file).write_bytes(data)
    (tmp_path / "out" / "sub").mkdir(parents=True)
    subprocess.run(
        ["tar", f"--format={format}", "--sort=name", "-cf", tmp_path / "out/sub/a.tar", *sorted(os.listdir(tmp_path / "src"))],
        cwd=tmp_path / "src", check=True, timeout=30,
    )  # fmt: skip
    index(tmp_path / "out")
    assert check(open_dataset(str(tmp_path / "out"))) == expected(files)
    assert (tmp_path / "out/index/sub/a.parquet").exists()


def test_bsd_tars_with_extended_headers_and_apple_double_files(tmp_path: Path) -> None:
    files = samples(["a/1", "a/" + "y" * 200])
    doubled = {}
    for name, data in files.items():
        folder, _, base = name.rpartition("/")
        doubled |= {f"{folder}/._{base}": b"\0\5\x16\7mac", name: data}
    pax = {"LIBARCHIVE.creationtime": "1700000000.5", "SCHILY.dev": "16777220", "atime": "1700000000.1"}
    pack(tmp_path / "a.tar", {**doubled, "README": b"hello"}, pax=pax)
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        folder_member = tarfile.TarInfo("b")
        folder_member.type = tarfile.DIRTYPE
        tar.addfile(folder_member)
    found = index(tmp_path)
    assert check(open_dataset(str(tmp_path))) == expected(files)
    assert found.other_files == 5
    assert found.manifest.shards == 1  # a tar without samples is not a shard


def test_sizes_in_pax_headers_are_used(tmp_path: Path) -> None:
    files = samples(["a", "b"])
    with (tmp_path / "a.tar").open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = 0  # the size in the USTAR header
            member.pax_headers = {"size": str(len(data))}
            file.write(member.tobuf(tarfile.PAX_FORMAT))
            file.write(data + b"\0" * (-len(data) % 512))
        tar.offset = file.tell()
    index(tmp_path)
    assert check(open_dataset(str(tmp_path))) == expected(files)


def test_image_formats_and_which_of_several_images_is_used(tmp_path: Path) -> None:
    large = WEBP[:26] + bytes([0x2C, 1, 0xC8, 0]) + WEBP[30:]
    extended = b"RIFF\0\0\0\0WEBPVP8X" + b"\x0a\0\0\0" + b"\0\0\0\0" + bytes([99, 0, 0]) + bytes([49, 1, 0])
    lossless = b"RIFF\0\0\0\0WEBPVP8L" + b"\x0a\0\0\0" + b"\x2f" + (29 | 19 << 14).to_bytes(4, "little")
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    files = {
        "a.JPG": picture(1, exif=exif.tobytes()),
        "b.jpeg": picture(2, icc_profile=b"p" * 300_000),
        "c.png": picture(3, "PNG"),
        "d.webp": large, "e.webp": extended, "f.webp": lossless,
        "g.webp": large, "g.png": picture(4, "PNG"), "g.jpg": picture(5), "g.jpeg": picture(6),
        "h.txt": b"no image", "h.json": b"{}",
    }  # fmt: skip
    pack(tmp_path / "a.tar", files)
    found = index(tmp_path)
    dataset = open_dataset(str(tmp_path))
    assert {key: image for key, (image, _) in check(dataset).items()} == {
        "a": files["a.JPG"], "b": files["b.jpeg"], "c": files["c.png"],
        "d": large, "e": extended, "f": lossless, "g": files["g.jpg"],
    }  # fmt: skip
    located = dataset.locate([3, 4, 5])
    assert list(zip(located.width.tolist(), located.height.tolist(), strict=True)) == [
        (300, 200),
        (100, 306),
        (30, 20),
    ]
    assert (found.without_image, found.without_label) == (1, 7)
    assert found.notes == [
        "1 sample with several images: used .webp (3) and .jpg (2) and .jpeg (1) and .png (1), not .webp (1) and .png (1) and "
        ".jpeg (1) (--image chooses)"
    ]


def test_labels_are_numbers_or_class_names_or_missing(tmp_path: Path) -> None:
    def labels_of(files: Files) -> tuple[list[int], list[str]]:
        pack(tmp_path / "a.tar", files)
        index(tmp_path, overwrite=True)
        dataset = open_dataset(str(tmp_path))
        return dataset.locate(np.arange(dataset.samples)).label.tolist(), dataset.manifest.classes

    def images(labels: dict[str, bytes]) -> Files:
        files = {}
        for i, (extension, data) in enumerate(labels.items()):
            files |= {f"{i}.jpg": picture(i), f"{i}.{extension.strip()}": data}
        return files

    numbers = {
        "cls": b" 2\n", "json": b'{"label": 1}', "json ": b'{"cls": "0"}', " json": b'{"class": 3, "label": null}',
        " json ": b'{"caption": "x"}', "json  ": b"[1]", "txt": b"5", "cls ": b"-1",
    }  # fmt: skip
    assert labels_of(images(numbers)) == ([2, 1, 0, 3, -1, -1, -1, -1], ["0", "1", "2", "3"])
    names = {"cls": b"dog", "json": b'{"label": "cat"}', "cls ": "bär".encode()}
    assert labels_of(images(names)) == ([2, 1, 0], ["bär", "cat", "dog"])
    both = {"0.jpg": picture(0), "0.cls": b"4", "0.json": b'{"label": 9} broken'}
    assert labels_of(both) == ([4], ["0", "1", "2", "3", "4"])
    for data, message in [
        ({"0.cls": b""}, "its .cls file cannot be a label: it is empty"),
        ({"0.cls": b"\xff\xfe"}, "not printable"),
        ({"0.cls": b"-2"}, "out of range"),
        ({"0.cls": b"9" * 5000}, "is infinite"),
        ({"0.cls": b"9" * 9}, "out of range"),
        ({"0.json": b"{"}, "its .json file is not valid JSON"),
        ({"0.json": b"[" * 100_000}, "its .json file is not valid JSON"),
        ({"0.json": b" " * (1 << 20) + b"{}"}, "its .json file is too large (1048578 bytes"),
        (
            {"0.cls": b"7", "1.jpg": picture(1), "1.cls": b"cat"},
            "a.tar: 1 at byte 3072: label cat is a class name, but 1 of 2 labels is a number",
        ),
    ]:
        pack(tmp_path / "a.tar", {"0.jpg": picture(0), **data})
        assert message in refused(tmp_path, overwrite=True)


def test_compressed_tars_are_refused_by_name_and_by_content(tmp_path: Path) -> None:
    plain = pack(tmp_path / "plain" / "x.tar", samples(["a"]))
    for suffix, mode in [("tar.gz", "gz"), ("tgz", "gz"), ("tar.bz2", "bz2"), ("tar.xz", "xz"), ("tar", "gz"), ("tar", "xz")]:  # fmt: skip
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        with tarfile.open(tmp_path / "out" / f"x.{suffix}", f"w:{mode}") as tar:
            tar.add(plain)
        for skip in (False, True):
            assert f"x.{suffix} is compressed" in refused(tmp_path / "out", skip_damaged=skip)
    (tmp_path / "out" / "x.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(1000))
    assert "x.tar is compressed" in refused(tmp_path / "out")
    for name in ("y.tar.zst", "y.TZST", "y.tar.lz4"):
        pack(tmp_path / "plain" / name, {})
        assert f"{name} is compressed" in refused(tmp_path / "plain")
        (tmp_path / "plain" / name).unlink()


def test_a_key_in_several_shards_is_an_error_or_skipped(tmp_path: Path) -> None:
    for i in range(6):
        pack(
            tmp_path / f"{i}.tar", samples([f"{i}/{j}" for j in range(5)] + (["0/3"] if i in (2, 5) else []))
        )
    said = refused(tmp_path)
    with tarfile.open(tmp_path / "0.tar") as tar:
        first = tar.getmember("0/3.jpg").offset_data
    with tarfile.open(tmp_path / "2.tar") as tar:
        second = tar.getmember("0/3.jpg").offset_data
    assert f"2.tar: 0/3 at byte {second}: duplicate key, it is also at byte {first} of 0.tar" in said
    found = index(tmp_path, skip_damaged=True)
    assert (found.skipped.count, found.manifest.samples) == (2, 30)
    assert sorted(check(open_dataset(str(tmp_path)))) == sorted(
        f"{i}/{j}" for i in range(6) for j in range(5)
    )


def test_checksums_detect_flipped_bytes_and_keep_the_fingerprint(tmp_path: Path) -> None:
    files = {f"{i}.jpg": noise(i, 300 + i) for i in range(12)}
    shard = pack(tmp_path / "x.tar", files)
    index(tmp_path, checksums=True)
    dataset = open_dataset(str(tmp_path))
    assert dataset.manifest.checksums
    assert {key: image for key, (image, _) in check(dataset).items()} == {k[:-4]: v for k, v in files.items()}
    assert verify(dataset) == []
    located = dataset.locate([3])
    data = bytearray(shard.read_bytes())
    data[int(located.offset[0] + located.size[0]) - 50] ^= 1
    shard.write_bytes(data)
    assert any("the image changed since" in problem for problem in verify(dataset))
    index(tmp_path, overwrite=True)  # without checksums the flipped byte is not detected
    assert verify(open_dataset(str(tmp_path))) == []
    assert open_dataset(str(tmp_path)).fingerprint != dataset.fingerprint


def test_indexing_a_built_dataset_keeps_its_fingerprint(scenes: Dataset, tmp_path: Path) -> None:
    shutil.copytree(scenes.store.root, tmp_path / "copy")
    found = index(tmp_path / "copy", overwrite=True, checksums=True)
    assert found.manifest.fingerprint == scenes.fingerprint
    copy = open_dataset(str(tmp_path / "copy"))
    for shard in range(scenes.manifest.shards):
        assert copy.read_index_table(shard) == scenes.read_index_table(shard)
    assert copy.shard_sha256 == scenes.shard_sha256


def test_indexes_can_be_written_to_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"sub/x.tar": samples(["a", "b"]), "y.tar": samples(["c"])}
    for name, content in files.items():
        pack(tmp_path / "tars" / name, content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.tar")}
    write = Store.write

    def read_only(store: Store, name: str, data: bytes) -> None:
        if store.url == str(tmp_path / "tars"):
            raise UserError(f"{store.describe(name)}: access denied")
        write(store, name, data)

    monkeypatch.setattr(Store, "write", read_only)
    assert "add --to" in refused(tmp_path / "tars")
    monkeypatch.chdir(tmp_path)
    index("tars", "index_only", checksums=True)
    dataset = open_dataset("index_only")
    assert dataset.manifest.shards_url == str(tmp_path / "tars")
    assert check(dataset).keys() == {"a", "b", "c"}
    assert verify(dataset) == []
    assert "already has a dataset" in _message(lambda: index("tars", "index_only"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.tar")} == before


def _message(call: object) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_a_failed_index_keeps_the_existing_dataset(tmp_path: Path) -> None:
    shard = pack(tmp_path / "shard-000000.tar", samples(["a"]))
    before = shard.read_bytes()
    index(tmp_path)
    manifest = (tmp_path / "manifest.json").read_bytes()
    assert "already has a dataset" in refused(tmp_path)
    pack(tmp_path / "y.tar", {**samples(["b"]), "c.jpg": b"torn"})
    assert "y.tar: c at byte" in refused(tmp_path, overwrite=True)  # and the old dataset is still intact
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    assert check(open_dataset(str(tmp_path))).keys() == {"a"}
    with pytest.raises(UserError, match="made by `maestream shards index`"):
        build("synthetic:?count=1", open_store(str(tmp_path)), BuildOptions(shard_bytes=1000), overwrite=True)
    assert shard.read_bytes() == before


def test_folders_that_cannot_be_indexed(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "has no .tar files" in refused(tmp_path)
    pack(tmp_path / "a.tar", {"n01.123.raw": picture(0), "x.txt": b"x"})
    assert "after the first dot of the file name" in refused(tmp_path)
    build_dataset("synthetic:?count=4", str(tmp_path / "half"), 100_000)
    (tmp_path / "half" / "manifest.json").rename(tmp_path / "half" / "building.json")
    assert "contains an unfinished build" in refused(tmp_path / "half")


class Counting:
    """Counts ranged reads and their bytes over all threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = self.reads = 0
        lock, read_range = threading.Lock(), Store.read_range

        def counted(store: Store, name: str, start: int, size: int) -> bytes:
            with lock:
                self.bytes += size
                self.reads += 1
            return read_range(store, name, start, size)

        monkeypatch.setattr(Store, "read_range", counted)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    return Counting(monkeypatch)


def test_few_bytes_are_read_for_large_images_and_few_reads_made_for_small_ones(
    tmp_path: Path, counting: Counting
) -> None:
    large = noise(0, 1000)
    assert len(large) > 400_000
    for i in range(3):
        pack(tmp_path / "large" / f"{i}.tar", {f"{i}_{j}.{e}": d for j in range(10) for e, d in (("jpg", large), ("cls", b"1"))})  # fmt: skip
    index(tmp_path / "large")
    assert counting.bytes < 0.05 * 30 * len(large)
    assert counting.reads <= 2 * 30 + 3
    counting.reads = counting.bytes = 0
    path = pack(tmp_path / "small" / "0.tar", samples([f"{i}" for i in range(500)]))
    index(tmp_path / "small")
    assert counting.reads < 12
    assert counting.bytes < 1.1 * path.stat().st_size


def test_indexing_tars_in_a_bucket(s3: str, tmp_path: Path, counting: Counting) -> None:
    files = {f"{i}.jpg": noise(i, 700) for i in range(4)} | samples(["9/b"])
    path = pack(tmp_path / "x.tar", files)
    url = f"{s3}/foreign"
    open_store(url).write("deep/x.tar", path.read_bytes())
    index(url)
    assert counting.bytes < 0.2 * path.stat().st_size
    assert open_store(url).names() == [
        "deep/x.tar",
        "index/deep/x.parquet",
        "manifest.json",
        "shards.parquet",
    ]
    local = tmp_path / "local"
    index(url, local, checksums=True)
    for dataset in (open_dataset(url), open_dataset(str(local))):
        assert {key: image for key, (image, _) in check(dataset).items()} == {
            name.removesuffix(".jpg"): data for name, data in files.items() if name.endswith(".jpg")
        }
    open_store(url).write("deep/x.tar", path.read_bytes()[:-20_000])
    assert json.loads((local / "manifest.json").read_text())["shards_url"] == url
    assert "the tar is cut off at byte" in refused(url, overwrite=True)
