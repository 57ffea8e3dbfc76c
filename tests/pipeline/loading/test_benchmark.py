"""The loader benchmark: a row per decoder and store, stages that add up, bad samples counted."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.decoder import DecoderName
from pipeline.errors import UserError
from pipeline.loading.benchmark import Measurement, Plan, available_decoders, bench_loader, bottleneck
from pipeline.loading.order import Order
from pipeline.stage_times import StageTimes

pytestmark = pytest.mark.integration


def make_plan(*datasets: Dataset, decoders: list[DecoderName]) -> Plan:
    """All samples in each batch, measured for a moment."""
    orders = [Order(dataset.shard_samples, 0, dataset.samples, 10, 4) for dataset in datasets]
    pairs = list(zip(datasets, orders, strict=True))
    return Plan(pairs, decoders, threads=2, size=32, disk_cache=None, seconds=0.1)


def copy_damaged(dataset: Dataset, folder: Path, sample_ids: list[int]) -> Dataset:
    """A copy of which these samples are no images any more."""
    shutil.copytree(dataset.store.root, folder)
    located = dataset.locate(sample_ids)
    for shard, offset in zip(located.shard.tolist(), located.offset.tolist(), strict=True):
        with (folder / dataset.shard_name(shard)).open("r+b") as file:
            file.seek(offset)
            file.write(b"none")
    return open_dataset(str(folder))


def test_a_row_for_each_decoder_and_store_whose_shares_sum_to_one(scenes: Dataset, tmp_path: Path) -> None:
    damaged = copy_damaged(scenes, tmp_path / "damaged", [3, 20])
    told: dict[str, float] = {}
    result = bench_loader(
        make_plan(scenes, damaged, decoders=available_decoders()),
        lambda what, seconds: told.update({what: seconds}),
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    stores = [scenes.store.url, damaged.store.url]
    assert [dataset["store"] for dataset in result["datasets"]] == stores
    rows = result["rows"]
    expected = [(store, decoder) for store in stores for decoder in available_decoders()]
    assert [(row["store"], row["executor"]) for row in rows] == expected
    assert told.keys() == {"one core alone"} | {f"{store}, {decoder}" for store, decoder in expected}
    for row in rows:
        stages = {name: stage for name, stage in row["stages"].items() if stage is not None}
        assert list(row["stages"]) == ["storage", "read", "decode", "resize", "copy"]
        assert sum(stage["share"] for stage in stages.values()) == pytest.approx(1)
        assert all(stage["us_per_image"] > 0 for name, stage in stages.items() if name != "copy")
        assert row["images"] % scenes.samples == 0
        assert row["img_per_s"] == pytest.approx(row["images"] / row["seconds"])
        assert row["bad_samples"] == (2 if row["store"] == damaged.store.url else 0)
        # What does both in one has no number for either; who writes into the batch copies nothing.
        in_one = row["executor"] == "dali"
        assert (row["stages"]["resize"] is None) == in_one
        assert (row["stages"]["copy"]["us_per_image"] > 0) == in_one


def test_the_busiest_bounds() -> None:
    def of(storage: float, reading: float, decoding: float) -> str | None:
        return bottleneck({"storage": storage, "reading": reading, "decoding": decoding})

    assert of(0.0, 0.2, 0.95) == "decoding"
    assert of(0.9, 0.05, 0.3) == "storage"
    assert of(0.1, 0.85, 0.9) == "reading"
    assert of(0.5, 0.45, 0.6) == "storage"  # its thread has no time left
    assert of(0.1, 0.2, 0.4) is None


def test_no_thread_is_busy_for_more_than_the_time() -> None:
    """Batches that were made before the measurement count, so a short one can have more thread time than it is long."""

    def busy(storage: float, decode: float) -> dict[str, float]:
        times = StageTimes(storage=storage, read=0.5, decode=decode, resize=0.5)
        return Measurement(images=8, seconds=2.0, stage_times=times, wait_s=0, bad=0).busy(threads=4)

    assert busy(storage=0.5, decode=3.5) == {"storage": 0.25, "reading": 0.25, "decoding": 0.5}
    assert busy(storage=0.5, decode=15.5) == {"storage": 0.125, "reading": 0.125, "decoding": 1.0}
    assert busy(storage=3.5, decode=3.5) == {"storage": 0.875, "reading": 0.125, "decoding": 0.25}


def test_a_dataset_of_bad_samples_has_no_floor(scenes: Dataset, tmp_path: Path) -> None:
    damaged = copy_damaged(scenes, tmp_path / "damaged", list(range(scenes.samples)))
    with pytest.raises(UserError, match="none of 70 samples can be decoded"):
        bench_loader(make_plan(damaged, decoders=["cpu"]), lambda what, seconds: None)
