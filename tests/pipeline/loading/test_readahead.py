"""The bytes of each step: right, once, bounded, whoever dies."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import index_name
from pipeline.errors import UserError
from pipeline.loading.disk_cache import DiskCache
from pipeline.loading.fetch_client import RESTARTS, Fetcher, Range
from tests.support.data.noise import CHUNK, assert_right, disk_cache, make_order, make_reader, write_noise
from tests.support.paths import ROOT
from tests.support.processes import processes

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """600 samples of about 6 kB in 5 shards."""
    return write_noise(tmp_path_factory.mktemp("noise"), 5, 120, 6000)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_each_step_gets_its_own_bytes_within_the_bound(noise: Dataset, data: st.DataObject) -> None:
    lanes = data.draw(st.sampled_from([1, 2, 3, 6, 12, 24]))
    order = make_order(noise, 24, lanes, data.draw(st.integers(1, 60)), data.draw(st.integers(0, 9)))
    world_size = data.draw(st.integers(1, min(lanes, 4)))
    rank = data.draw(st.integers(0, world_size - 1))
    start = data.draw(st.integers(0, 2 * order.steps_per_epoch))
    stop = start + data.draw(st.integers(1, 40))
    bound = data.draw(st.sampled_from([0, 1 << 16, 1 << 24]))
    reader = make_reader(noise, order, start, stop, rank, world_size, bound)
    try:
        for step in range(start, stop):
            samples = reader.read(step)
            assert samples.ids.tolist() == order.step_ids(step, rank, world_size).tolist()
            assert_right(noise, samples)
            current = {id(block) for block, _ in reader.places.values() if block.step <= step}
            needed = sum(
                b.size
                for b, _ in {id(b): (b, i) for b, i in reader.places.values()}.values()
                if id(b) in current
            )
            assert reader.held_bytes <= max(bound, needed)
    finally:
        reader.close()
    assert not reader.queue


def test_what_is_held_does_not_change_while_memory_is_filled_again(noise: Dataset) -> None:
    order = make_order(noise, lanes=6, global_batch=12, block=8)
    reader, held = make_reader(noise, order, 0, 2 * order.steps_per_epoch), []
    for step in range(2 * order.steps_per_epoch):
        samples = reader.read(step)
        assert_right(noise, samples)
        if step % 7 == 0:
            held.append(samples)
    for samples in held:
        assert_right(noise, samples)
    reader.close()
    made = next(reader.fetcher.buffers.numbers)
    assert made < reader.fetcher.requests * 3 / 4  # the others were filled again


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_an_epoch_reads_each_byte_about_once(noise: Dataset, world_size: int) -> None:
    order = make_order(noise, lanes=24, global_batch=24, block=8)
    fetched = 0
    for rank in range(world_size):
        reader = make_reader(noise, order, 0, order.steps_per_epoch, rank, world_size)
        for step in range(order.steps_per_epoch):
            reader.read(step)
        assert reader.places == {}
        assert reader.held_bytes == 0
        fetched += reader.fetcher.storage_bytes
        reader.close()
    assert 0.9 < fetched / noise.shard_bytes.sum() <= 1.1


def test_the_first_batch_reads_at_most_twice_its_own_bytes(tmp_path: Path) -> None:
    dataset = write_noise(tmp_path, 4, 1100, 3000)
    order = make_order(dataset, global_batch=4096, lanes=1024, block=128)
    reader = make_reader(dataset, order, 0, 1, bound=1 << 30)
    samples = reader.read(0)
    assert_right(dataset, samples)
    indexes = sum(Path(dataset.store.root, index_name(f"shard-{s:06d}.tar")).stat().st_size for s in range(4))
    assert reader.fetcher.storage_bytes - indexes <= 2 * samples.located.size.sum()
    reader.close()


def test_the_second_epoch_finds_what_is_kept(noise: Dataset, tmp_path: Path) -> None:
    order = make_order(noise)
    epoch = order.steps_per_epoch
    fetched = []
    for share in (0.5, 0.5, 0.5, 1.0, 1.0):
        with disk_cache(noise, tmp_path, share) as kept:
            reader = make_reader(noise, order, epoch * len(fetched), epoch * (len(fetched) + 1), kept=kept)
            for step in range(reader.start, reader.stop):
                assert_right(noise, reader.read(step))
            reader.close()
            fetched.append(reader.fetcher.storage_bytes / noise.shard_bytes.sum())
            held = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
            assert held <= share * noise.shard_bytes.sum()
    # What is kept by 0.5 is not what is kept by 1.0: that begins from nothing.
    assert fetched[0] == pytest.approx(1, abs=0.12)
    assert fetched[1] == pytest.approx(0.5, abs=0.08)
    assert fetched[2] == pytest.approx(0.5, abs=0.08)
    assert fetched[4] < 0.1


def test_kept_parts_that_nobody_uses_go(noise: Dataset, tmp_path: Path) -> None:
    (tmp_path / "someone-elses").mkdir()
    with disk_cache(noise, tmp_path, 0.5) as first:
        first.write(0, 0, memoryview(b"x" * CHUNK))
        Path(first.folder, ".maestream-tmp", "3-4").write_bytes(b"half")
        with disk_cache(noise, tmp_path, 0.25) as second:
            assert Path(first.folder).is_dir()  # in use
        with disk_cache(noise, tmp_path, 0.5):
            assert Path(first.folder, ".maestream-tmp", "3-4").exists()  # somebody may be writing it
    with disk_cache(noise, tmp_path, 0.5) as first:
        assert first.read(0, 0, 5, memoryview(found := bytearray(10)))
        assert found == b"x" * 10
        assert not Path(second.folder).exists()
        assert list(Path(first.folder, ".maestream-tmp").iterdir()) == []
    assert (tmp_path / "someone-elses").is_dir()


@given(chunks=st.integers(1, 3000), data=st.data())
def test_exactly_so_many_chunks_are_kept(chunks: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, chunks))
    part = DiskCache("", kept, chunks)
    assert sum(map(part.holds, range(chunks))) == kept


def test_a_wrong_byte_in_the_kept_part_is_read_again_from_storage(noise: Dataset, tmp_path: Path) -> None:
    order = make_order(noise)
    with disk_cache(noise, tmp_path, 1.0) as kept:
        for attempt in range(3):
            reader = make_reader(noise, order, 0, order.steps_per_epoch, kept=kept)
            for step in range(order.steps_per_epoch):
                assert_right(noise, reader.read(step))
            reader.close()
            if attempt == 1:
                assert reader.fetcher.cached_bytes > noise.shard_bytes.sum() / 2
            rng = random.Random(attempt)
            for path in sorted(Path(kept.folder).glob("0*/*"))[:: 1 + attempt]:
                data = bytearray(path.read_bytes())
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                path.write_bytes(data if rng.random() < 0.7 else data[: len(data) // 2])


def test_a_kept_part_that_takes_no_more_is_said_once(
    noise: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order = make_order(noise)
    with disk_cache(noise, tmp_path, 1.0) as kept:
        for shard in range(5):
            Path(kept.folder, f"{shard:07d}").write_bytes(b"")  # where a folder has to be
        reader = make_reader(noise, order, 0, order.steps_per_epoch, kept=kept)
        with caplog.at_level(logging.WARNING, "maestream"):
            for step in range(order.steps_per_epoch):
                assert_right(noise, reader.read(step))
            reader.close()
        assert caplog.text.count("cannot write to the disk cache") == 1
        assert list(Path(kept.folder, ".maestream-tmp").iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("mount") is None, reason="mounts a small disk")
def test_a_full_disk_is_said_and_nothing_is_lost(
    noise: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], check=False).returncode:
        pytest.skip("may not mount here")
    try:
        order = make_order(noise)
        with disk_cache(noise, tmp_path, 1.0) as kept, caplog.at_level(logging.WARNING, "maestream"):
            for epoch in (0, 1):
                steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
                reader = make_reader(noise, order, steps.start, steps.stop, kept=kept)
                for step in steps:
                    assert_right(noise, reader.read(step))
                reader.close()
            assert 0 < reader.fetcher.cached_bytes < 1 << 20
        assert "No space left on device" in caplog.text
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_killed_fetcher_is_replaced_and_no_byte_is_wrong(
    noise: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order, rng = make_order(noise), random.Random(0)
    with disk_cache(noise, tmp_path, 0.5) as kept, caplog.at_level(logging.WARNING, "maestream"):
        reader = make_reader(noise, order, 0, 3 * order.steps_per_epoch, kept=kept)
        for step in range(3 * order.steps_per_epoch):
            if step % 15 == 3:
                time.sleep(rng.random() * 0.02)
                reader.fetcher.process.kill()
            assert_right(noise, reader.read(step))
        reader.close()
    assert "restarting it" in caplog.text
    assert processes("pipeline.loading.fetch_process", os.getpid()) == []


def test_a_fetcher_that_cannot_live_is_one_message(noise: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    fetcher = Fetcher(noise.store.url, noise.store.url)
    with pytest.raises(UserError, match="dies again and again"):
        fetcher.read_ranges([Range(noise.shard_name(0), 0, 10, 0, 0, 0)], fill_cache=False).result(60)
    with pytest.raises(UserError, match="dies again and again"):  # also who asks later
        fetcher.read_file("manifest.json").result(60)
    fetcher.close()
    assert RESTARTS < 10


READ_ON = """
import sys
from pathlib import Path
from tests.support.data.noise import disk_cache, make_order, make_reader, assert_right
from pipeline.dataset.dataset import open_dataset
dataset = open_dataset(sys.argv[1])
order = make_order(dataset)
with disk_cache(dataset, Path(sys.argv[2]), 0.5) as kept:
    reader = make_reader(dataset, order, 0, 40 * order.steps_per_epoch, kept=kept)
    print(reader.fetcher.process.pid, flush=True)
    for step in range(40 * order.steps_per_epoch):
        assert_right(dataset, reader.read(step))
        print(step, flush=True)
    reader.close()
"""


def kill_at_random(dataset: Dataset, folder: Path, kills: int, seed: int) -> None:
    """Start a worker, kill it or its fetcher (SIGKILL) at a random moment; the next one reads no wrong byte, and
    at the end there is nothing left over."""
    rng = random.Random(seed)
    for _ in range(kills):
        worker = subprocess.Popen(
            [sys.executable, "-c", READ_ON, dataset.store.url, folder],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert worker.stdout is not None
        assert worker.stderr is not None
        fetcher = int(worker.stdout.readline() or 0)
        assert fetcher, worker.stderr.read()
        time.sleep(rng.random() * 0.6)
        if rng.random() < 0.5:
            os.kill(fetcher, signal.SIGKILL)
            time.sleep(rng.random() * 0.3)
        assert worker.poll() in (None, 0), worker.stderr.read()
        worker.kill()
        worker.communicate()
        deadline = time.monotonic() + 5
        while (left := processes("pipeline.loading.fetch_process", fetcher)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert left == []
    order = make_order(dataset)
    with disk_cache(dataset, folder, 0.5) as kept:
        reader = make_reader(dataset, order, 0, order.steps_per_epoch, kept=kept)
        for step in range(order.steps_per_epoch):
            assert_right(dataset, reader.read(step))
        reader.close()
        assert list(Path(kept.folder, ".maestream-tmp").iterdir()) == []
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".maestream-lock"]
        assert all(path.stat().st_size == CHUNK or path.parent.name.startswith("0") for path in files)
        assert sum(path.stat().st_size for path in files) <= dataset.shard_bytes.sum() / 2


def test_kills_leave_no_wrong_byte_and_nothing_behind(noise: Dataset, tmp_path: Path) -> None:
    kill_at_random(noise, tmp_path, 4, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_200_kills_leave_no_wrong_byte_and_nothing_behind(noise: Dataset, tmp_path: Path) -> None:
    kill_at_random(noise, tmp_path, 200, seed=1)
