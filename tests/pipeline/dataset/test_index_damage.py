"""Damage in existing tars is reported, and no sample is lost silently."""

import io
import re
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from tests.support.data.foreign_tars import check, expected, index, pack, picture, refused, samples


def broken_header(data: bytes, name: bytes) -> bytes:
    at = data.index(name)
    return data[:at] + b"\xff" + data[at + 1 :]


DAMAGED: dict[str, tuple[dict, str]] = {  # case → files between two intact samples, message
    "empty": ({"m.jpg": b""}, "m at byte 2560: m.jpg: the file is empty"),
    "text": ({"m.jpg": b"hello"}, "not an image: expected JPEG, PNG"),
    "torn": ({"m.png": picture(0, "PNG")[:20]}, "m.png: "),
    "twice": ({"m.jpg": picture(0), "m.JPG": picture(1)}, "two .jpg files"),
    "apart": ({"m.txt": b"", "a.txt": b"again"}, "a at byte 3072: duplicate key, it is also at byte 0"),
    "absolute": ({"/m.jpg": picture(0)}, "/m.jpg is absolute"),
    "above": ({"../m.jpg": picture(0)}, "../m.jpg is absolute or contains .."),
    "hidden": ({"m\u202e.jpg": picture(0)}, "not printable"),
    "link": ({"m.jpg": tarfile.SYMTYPE}, "m.jpg is a link to a.jpg"),
    "hard": ({"m.jpg": tarfile.LNKTYPE}, "m.jpg is a link to a.jpg"),
    "pipe": ({"m.jpg": tarfile.FIFOTYPE}, "m.jpg is not a regular file"),
    "sparse": ({"m.jpg": tarfile.GNUTYPE_SPARSE}, "m.jpg is a sparse file"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_sample_is_an_error_or_skipped(tmp_path: Path, name: str) -> None:
    files, message = DAMAGED[name]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for file, data in {**samples(["a"]), **files, **samples(["z"], 1)}.items():
            member = tarfile.TarInfo(file)
            if file in files and len(data) == 1:
                member.type, member.linkname = data, "a.jpg"
            else:
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    said = refused(tmp_path)
    assert message in said
    assert "x.tar: " in said
    assert " at byte " in said
    assert "--skip-damaged" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]  # nothing is written
    found = index(tmp_path, skip_damaged=True)
    assert found.skipped.count == 1
    assert message in found.skipped.listed[0]
    assert check(open_dataset(str(tmp_path))) == expected({**samples(["a"]), **samples(["z"], 1)})


def test_the_byte_where_a_tar_is_cut_off_is_reported(tmp_path: Path) -> None:
    whole = pack(tmp_path / "x.tar", samples(["a", "b", "c"])).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        second = next(m for m in tar if m.name == "b.jpg")
        end = 512 * (-(-(second.offset_data + second.size) // 512))
    ours = {key: value for key, value in expected(samples(["a", "b", "c"])).items() if key == "a"}
    tail = {
        "inside b.jpg": whole[: second.offset_data + 100],
        "no end mark": whole[:end],
        "at byte": whole[: end + 100],
        "is damaged": broken_header(whole, b"b.jpg"),
        "after the end mark": whole[: second.offset] + b"\0" * 512 + whole[second.offset + 512 :],
    }
    for message, data in tail.items():
        (tmp_path / "x.tar").write_bytes(data)
        said = refused(tmp_path, overwrite=True)
        assert message in said
        assert "in or after b at byte" in said
        assert str(second.offset if "mark at" in said or "damaged," in said else len(data)) in said
        found = index(tmp_path, skip_damaged=True, overwrite=True, checksums=True)
        assert found.skipped.count == 1
        dataset = open_dataset(str(tmp_path))
        assert check(dataset) == ours, message
        assert verify(dataset) == []  # the digest covers the whole file
    (tmp_path / "x.tar").write_bytes(b"")
    assert "x.tar: the file is empty" in refused(tmp_path, overwrite=True)
    (tmp_path / "x.tar").write_bytes(b"hello" * 500)
    assert "x.tar: it is not a tar" in refused(tmp_path, overwrite=True)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[int], dict]:
    """Folder, bytes, header offsets and samples of a tar with GNU long names."""
    folder = tmp_path_factory.mktemp("mixed")
    files = samples([f"f/{i}" * (40 if i % 4 == 3 else 1) for i in range(10)])
    whole = pack(folder / "x.tar", files, tarfile.GNU_FORMAT).read_bytes()
    with tarfile.open(folder / "x.tar") as tar:
        offsets = [o for m in tar for o in {m.offset, m.offset_data - 512}]
    return folder, whole, offsets, expected(files)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_sample_is_lost_silently(mixed: tuple[Path, bytes, list[int], dict], data: st.DataObject) -> None:
    """For a tar cut anywhere, or with a flipped bit in a header: the index is correct, or the error names the tar."""
    folder, whole, offsets, sound = mixed
    if data.draw(st.booleans()):
        changed = whole[: data.draw(st.integers(0, len(whole)))]
    else:
        at = data.draw(st.sampled_from(offsets)) + data.draw(st.integers(0, 511))
        changed = whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :]
    (folder / "x.tar").write_bytes(changed)
    try:
        index(folder, overwrite=True)
    except UserError as error:
        assert re.search("x.tar: (it is|the|data follows) ", str(error))  # noqa: PT017
    else:
        assert check(open_dataset(str(folder))) == sound
    try:
        found = index(folder, overwrite=True, skip_damaged=True)
    except UserError as error:
        assert "no images in 1 tar" in str(error)  # noqa: PT017
    else:
        kept = check(open_dataset(str(folder)))
        assert kept.items() <= sound.items()
        assert len(kept) == len(sound) or found.skipped.count
