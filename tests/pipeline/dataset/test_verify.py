"""`verify` and `open_dataset` detect and report every kind of damage."""

import contextlib
import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.verify import verify
from pipeline.errors import UserError

pytestmark = pytest.mark.integration


def test_verify_finds_every_kind_of_damage(scenes: Dataset, tmp_path: Path) -> None:
    rng = random.Random(0)
    shutil.copytree(scenes.store.root, tmp_path / "copy")
    dataset = open_dataset(str(tmp_path / "copy"))
    shard = tmp_path / "copy" / dataset.shard_name(1)
    sound = shard.read_bytes()
    for at in rng.sample(range(len(sound)), 20):  # any flipped byte
        shard.write_bytes(sound[:at] + bytes([sound[at] ^ 0x10]) + sound[at + 1 :])
        assert any(shard.name in problem for problem in verify(dataset)), at
    first = dataset.locate([int(dataset.shard_starts[1])])
    at = int(first.offset[0]) + 100  # a byte of an image: the report names the sample, too
    shard.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    key = dataset.keys([int(dataset.shard_starts[1])])[0]
    assert any(key in problem for problem in verify(dataset))
    shard.write_bytes(sound[:-5000])
    assert any("the manifest says" in problem for problem in verify(dataset))
    shard.unlink()
    assert verify(dataset) == [f"{shard.name}: missing"]


def test_a_damaged_index_or_table_is_an_error_that_names_it(scenes: Dataset, tmp_path: Path) -> None:
    rng = random.Random(0)
    shutil.copytree(scenes.store.root, tmp_path / "copy")
    for name in ("index/shard-000001.parquet", "shards.parquet"):
        path = tmp_path / "copy" / name
        sound = path.read_bytes()
        for _ in range(60):
            at = rng.randrange(len(sound))
            path.write_bytes(sound[:at] + bytes([sound[at] ^ (1 << rng.randrange(8))]) + sound[at + 1 :])
            with contextlib.suppress(UserError):  # anything else is a crash
                verify(open_dataset(str(tmp_path / "copy")))
        path.write_bytes(sound)
    assert verify(open_dataset(str(tmp_path / "copy"))) == []
    table = pq.read_table(tmp_path / "copy" / "shards.parquet")
    pq.write_table(table.take(list(reversed(range(len(table))))), tmp_path / "copy" / "shards.parquet")
    with pytest.raises(UserError, match=r"shards\.parquet does not match manifest\.json"):
        open_dataset(str(tmp_path / "copy"))


def test_invalid_manifests_are_errors(scenes: Dataset, tmp_path: Path) -> None:
    shutil.copytree(scenes.store.root, tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    tree = json.loads(manifest.read_text())
    for text, message in [
        (json.dumps({**tree, "format_version": 99, "shape": "new"}), "upgrade maestream"),
        ("{ not json", "is damaged"),
        (json.dumps({"format_version": 1}), "is damaged"),
        (json.dumps({**tree, "samples": 7}), "does not match"),
    ]:
        manifest.write_text(text)
        with pytest.raises(UserError, match=message):
            open_dataset(str(tmp_path / "copy"))
    manifest.unlink()
    with pytest.raises(UserError, match="not a dataset"):
        open_dataset(str(tmp_path / "copy"))
