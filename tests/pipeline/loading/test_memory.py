"""Promise 6: memory is bounded by numbers in the config, and does not grow. What `pipeline.loading.loader` states."""

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.factory import make_decoder
from pipeline.loading.disk_cache import CHUNK_BYTES
from pipeline.loading.fetch_process import FILE_BYTES, GET_BYTES, LARGE_READS, SMALL_BYTES, SMALL_READS
from pipeline.loading.loader import PREFETCH_BATCHES, Loader
from pipeline.loading.order import Order
from tests.support.datasets import build_dataset
from tests.support.memory_probe import Job, Look
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]
EPOCHS = 20
OTHER_BYTES = 32 << 20  # see there
# How much higher the last ten epochs may peak than those before. Of a leak of a kilobyte a sample they would have
# 9 MB in the smallest of the datasets here.
FLAT_BYTES = 6 << 20


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """900 pictures that decode fast, with noise behind their end to make them as heavy as photographs: 41 MB."""
    folder, rng, file = tmp_path_factory.mktemp("padded"), np.random.default_rng(0), io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "JPEG")
    for i in range(900):
        path = folder / "source" / f"class-{i % 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue() + rng.bytes(int(rng.integers(20_000, 64_000))))
    return build_dataset(str(folder / "source"), str(folder / "dataset"), 4 << 20)


def watch(job: Job) -> list[Look]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.memory_probe", json.dumps(asdict(job))],
        check=True,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    return [Look(**json.loads(line)) for line in done.stdout.splitlines()]


def assert_bounded_and_flat(job: Job, flat_bytes: int = FLAT_BYTES) -> None:
    dataset = open_dataset(job.dataset)
    order = Order(dataset.shard_samples, 0, job.global_batch, job.lanes, job.block)
    bound = Loader(dataset, order, make_decoder("cpu", job.size, 1), 0, 1).lane_bytes * job.lanes
    assert bound < dataset.manifest.image_bytes / 3  # else this would say nothing

    looks = watch(job)
    assert [look.epoch for look in looks] == [e for e in range(EPOCHS) for _ in range(order.steps_per_epoch)]
    for part in ("worker", "fetcher", "held"):
        early = max(getattr(look, part) for look in looks if 1 <= look.epoch < EPOCHS // 2)
        late = max(getattr(look, part) for look in looks if look.epoch >= EPOCHS // 2)
        print(f"{part}: {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB")
        assert late - early <= flat_bytes, part

    # As the docstring of pipeline.loading.loader has it.
    step = max(look.step for look in looks)
    block = int(job.block * dataset.mean_sample_bytes)
    held = (bound + (PREFETCH_BATCHES + 2) * step + job.lanes * block) * 5 // 4 + bound // 8
    pixels = (PREFETCH_BATCHES + 2) * job.global_batch * 3 * job.size**2
    print(f"bound {bound / 1e6:.1f} MB, held {held / 1e6:.1f} MB, pixels {pixels / 1e6:.1f} MB")
    assert max(look.held for look in looks) <= held
    assert max(look.worker for look in looks) <= held + pixels + OTHER_BYTES
    piece = FILE_BYTES if dataset.shard_store.is_local else GET_BYTES
    reads = LARGE_READS * 2 * (piece + (2 * CHUNK_BYTES if job.cache else 0)) + SMALL_READS * SMALL_BYTES
    assert max(look.fetcher for look in looks) <= reads + FLAT_BYTES
    if job.cache:
        assert job.cache[1] / 2 < max(look.kept for look in looks) <= job.cache[1]


@pytest.mark.parametrize("kept_bytes", [0, 12_000_000])
def test_memory_is_bounded_and_does_not_grow(padded: Dataset, tmp_path: Path, kept_bytes: int) -> None:
    cache = (str(tmp_path), kept_bytes) if kept_bytes else None
    assert_bounded_and_flat(Job(padded.store.url, 24, 3, 16, 32, EPOCHS, cache))


def test_memory_is_bounded_while_workers_are_lost_and_join(padded: Dataset) -> None:
    assert_bounded_and_flat(Job(padded.store.url, 24, 3, 16, 32, EPOCHS, None, changes=True))


@pytest.mark.soak
def test_memory_is_bounded_over_s3(padded: Dataset, s3: str) -> None:
    dataset = build_dataset(str(Path(padded.store.root).with_name("source")), f"{s3}/padded", 4 << 20)
    assert_bounded_and_flat(Job(dataset.store.url, 24, 3, 16, 32, EPOCHS, None))


@pytest.mark.soak
@pytest.mark.parametrize("kept_share", [0, 0.4])
def test_memory_is_bounded_with_photographs(photographs: Dataset, tmp_path: Path, kept_share: float) -> None:
    cache = (str(tmp_path), int(kept_share * photographs.shard_bytes.sum())) if kept_share else None
    # A decoding thread holds an image's pixels, and these are not all of one size.
    assert_bounded_and_flat(Job(photographs.store.url, 8, 2, 8, 224, EPOCHS, cache), 16 << 20)


@pytest.fixture(scope="module")
def many_scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """3000 drawn scenes, 166 MB."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    return build_dataset("synthetic:?count=3000&classes=5", str(folder), 8 << 20)


@pytest.mark.soak
@pytest.mark.parametrize("kept_share", [0, 0.4])
def test_memory_is_bounded_with_scenes(many_scenes: Dataset, tmp_path: Path, kept_share: float) -> None:
    cache = (str(tmp_path), int(kept_share * many_scenes.shard_bytes.sum())) if kept_share else None
    assert_bounded_and_flat(Job(many_scenes.store.url, 64, 8, 16, 224, EPOCHS, cache), 16 << 20)
