"""What the tars still tell is mended, byte for byte; what they do not is named."""

import shutil
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.manifest import Dataset, open_dataset
from pipeline.repair import repair
from pipeline.verify import verify


@pytest.fixture
def copy(scenes: Dataset, tmp_path: Path) -> Path:
    shutil.copytree(scenes.store.root, tmp_path / "copy")
    return tmp_path / "copy"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_to_mend(copy: Path) -> None:
    before = files(copy)
    repaired = repair(str(copy))
    assert (repaired.mended, repaired.lost) == ([], [])
    assert files(copy) == before


def test_indexes_and_table_become_what_they_were(copy: Path) -> None:
    before = files(copy)
    (copy / "index/shard-000000.parquet").unlink()
    (copy / "index/shard-000001.parquet").write_bytes(b"what")
    shutil.copy(copy / "index/shard-000003.parquet", copy / "index/shard-000002.parquet")
    repaired = repair(str(copy))
    assert len(repaired.mended) == 3
    assert repaired.lost == []
    assert files(copy) == before
    (copy / "shards.parquet").unlink()
    assert "it is as it was" in repair(str(copy)).mended[0]
    assert files(copy) == before


def test_a_manifest_is_made_again(copy: Path, scenes: Dataset) -> None:
    (copy / "manifest.json").unlink()
    repaired = repair(str(copy))
    assert "class names are those of the keys' folders" in repaired.mended[0]
    mended = open_dataset(str(copy))
    assert mended.fingerprint == scenes.fingerprint
    assert mended.samples == scenes.samples
    assert verify(mended) == []


def test_what_has_to_be_built_again_is_named(copy: Path) -> None:
    shard = copy / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    (copy / "shard-000002.tar").unlink()
    before = files(copy)
    lost = repair(str(copy)).lost
    assert [line.split(":")[0] for line in lost] == ["shard-000001.tar", "shard-000002.tar"]
    assert all("has to be built again from synthetic:" in line for line in lost)
    assert files(copy) == before
    (copy / "shards.parquet").unlink()
    before = files(copy)
    with pytest.raises(UserError, match="not those that were written"):
        repair(str(copy))
    assert files(copy) == before
    (copy / "manifest.json").unlink()
    for tar in copy.glob("*.tar"):
        tar.unlink()
    with pytest.raises(UserError, match=r"no shard-\*\.tar"):
        repair(str(copy))
