"""Repair restores indexes, table and manifest from the tars, and lists what it cannot restore."""

import shutil
from pathlib import Path

import pytest

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.repair import repair
from pipeline.dataset.verify import verify
from pipeline.errors import UserError


@pytest.fixture
def copy(scenes: Dataset, tmp_path: Path) -> Path:
    shutil.copytree(scenes.store.root, tmp_path / "copy")
    return tmp_path / "copy"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_intact_dataset_needs_no_repair(copy: Path) -> None:
    before = files(copy)
    result = repair(str(copy))
    assert (result.repaired, result.unrepaired) == ([], [])
    assert files(copy) == before


def test_indexes_and_table_are_restored_byte_for_byte(copy: Path) -> None:
    before = files(copy)
    (copy / "index/shard-000000.parquet").unlink()
    (copy / "index/shard-000001.parquet").write_bytes(b"what")
    shutil.copy(copy / "index/shard-000003.parquet", copy / "index/shard-000002.parquet")
    result = repair(str(copy))
    assert len(result.repaired) == 3
    assert result.unrepaired == []
    assert files(copy) == before
    (copy / "shards.parquet").unlink()
    assert "it matches manifest.json" in repair(str(copy)).repaired[0]
    assert files(copy) == before


def test_a_lost_manifest_is_rebuilt_from_the_tars(copy: Path, scenes: Dataset) -> None:
    (copy / "manifest.json").unlink()
    result = repair(str(copy))
    assert "class names are taken from the folders of the keys" in result.repaired[0]
    dataset = open_dataset(str(copy))
    assert dataset.fingerprint == scenes.fingerprint
    assert dataset.samples == scenes.samples
    assert verify(dataset) == []


def test_damaged_tars_are_listed_as_not_repairable(copy: Path) -> None:
    shard = copy / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    (copy / "shard-000002.tar").unlink()
    before = files(copy)
    unrepaired = repair(str(copy)).unrepaired
    assert [line.split(":")[0] for line in unrepaired] == ["shard-000001.tar", "shard-000002.tar"]
    assert all("build it again from synthetic:" in line for line in unrepaired)
    assert files(copy) == before
    (copy / "shards.parquet").unlink()
    before = files(copy)
    with pytest.raises(UserError, match="the tars do not match manifest"):
        repair(str(copy))
    assert files(copy) == before
    (copy / "manifest.json").unlink()
    for tar in copy.glob("*.tar"):
        tar.unlink()
    with pytest.raises(UserError, match=r"no shard-\*\.tar"):
        repair(str(copy))
