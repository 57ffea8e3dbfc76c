"""A batch is a pure function of the step, and a bad byte neither stops a run nor hides."""

import logging
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.errors import UserError
from tests.support.data.loaders import make_loader


def test_steps_are_batches_in_order(scenes: Dataset) -> None:
    reader = make_loader(scenes)
    batches = list(reader.steps(3, 14))
    assert [batch.step for batch in batches] == list(range(3, 14))
    assert [batch.epoch for batch in batches] == [step // 5 for step in range(3, 14)]
    again = make_loader(scenes)
    for batch in reversed(batches):
        alone = again.batch(batch.step)
        assert (alone.images == batch.images).all()
        assert (alone.sample_ids == batch.sample_ids).all()
        assert (alone.labels == batch.labels).all()
    assert (batches[0].weights == 1).all()


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_world_size_sees_the_same_pixels(scenes: Dataset, world_size: int) -> None:
    alone = make_loader(scenes).batch(7)
    expected = dict(zip(alone.sample_ids.tolist(), alone.images, strict=True))
    seen = {}
    for rank in range(world_size):
        part = make_loader(scenes, rank, world_size).batch(7)
        seen |= dict(zip(part.sample_ids.tolist(), part.images, strict=True))
    assert seen.keys() == expected.keys()
    assert all((seen[i] == expected[i]).all() for i in seen)


def test_leaving_early_ends_its_threads(scenes: Dataset) -> None:
    before = set(threading.enumerate())
    reader = make_loader(scenes)
    for batch in reader.steps(0, 10):
        if batch.step == 2:
            break
    own = set(threading.enumerate()) - before
    assert own
    reader.close()
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in own) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in own)


def damage(dataset: Dataset, tmp_path: Path, sample: int) -> Dataset:
    """A copy of the dataset with a byte of one image changed."""
    shutil.copytree(dataset.store.root, tmp_path / "damaged")
    located = dataset.locate([sample])
    path = tmp_path / "damaged" / dataset.shard_name(int(located.shard[0]))
    data = bytearray(path.read_bytes())
    data[int(located.offset[0]) + int(located.size[0]) // 2] ^= 0xFF
    path.write_bytes(data)
    return open_dataset(str(tmp_path / "damaged"))


def test_a_changed_byte_is_a_bad_sample_with_weight_0_and_a_name(
    scenes: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = make_loader(scenes).order.step_ids(0)
    victim = int(ids[5])
    reader = make_loader(damage(scenes, tmp_path, victim))
    with caplog.at_level(logging.WARNING, "maestream"):
        batch = reader.batch(0)
    sound = make_loader(scenes).batch(0)
    assert batch.weights.tolist() == [1.0] * 5 + [0.0] + [1.0] * 6
    assert (batch.images[5] == 0).all()
    others = torch.arange(12) != 5
    assert (batch.images[others] == sound.images[others]).all()
    assert scenes.keys([victim])[0] in caplog.text
    assert "crc32c" in caplog.text


def test_missing_and_short_shards_stop_with_one_message(scenes: Dataset, tmp_path: Path) -> None:
    shutil.copytree(scenes.store.root, tmp_path / "copy")
    dataset = open_dataset(str(tmp_path / "copy"))
    shard = tmp_path / "copy" / dataset.shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-200_000])
    with pytest.raises(UserError, match=r"shard-000001\.tar is shorter than the manifest says"):
        list(make_loader(dataset).steps(0, 5))
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar is missing"):
        list(make_loader(dataset).steps(0, 5))
    with pytest.raises(
        UserError, match=r"shard-000001\.tar is missing"
    ):  # without the fetcher, as pictures read
        [make_loader(dataset).batch(step) for step in range(5)]
