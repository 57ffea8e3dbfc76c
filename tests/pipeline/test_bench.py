"""The loader's benchmark: a row for each executor and store, stages that add up, bad samples counted."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.bench import Plan, bench_loader, bound, executors_here
from pipeline.decode import DecoderName
from pipeline.errors import UserError
from pipeline.manifest import Dataset, open_dataset
from pipeline.order import Order


def make_plan(*datasets: Dataset, executors: list[DecoderName]) -> Plan:
    """All samples in each batch, measured for a moment."""
    orders = [Order(dataset.shard_samples, 0, dataset.samples, 10, 4) for dataset in datasets]
    pairs = list(zip(datasets, orders, strict=True))
    return Plan(pairs, executors, threads=2, size=32, cache=None, seconds=0.1)


def copy_damaged(dataset: Dataset, folder: Path, sample_ids: list[int]) -> Dataset:
    """A copy of which these samples are no images any more."""
    shutil.copytree(dataset.store.root, folder)
    located = dataset.locate(sample_ids)
    for shard, offset in zip(located.shard.tolist(), located.offset.tolist(), strict=True):
        with (folder / dataset.shard_name(shard)).open("r+b") as file:
            file.seek(offset)
            file.write(b"none")
    return open_dataset(str(folder))


def test_a_row_for_each_executor_and_store_whose_shares_sum_to_one(scenes: Dataset, tmp_path: Path) -> None:
    damaged = copy_damaged(scenes, tmp_path / "damaged", [3, 20])
    told: dict[str, float] = {}
    result = bench_loader(
        make_plan(scenes, damaged, executors=executors_here()),
        lambda what, seconds: told.update({what: seconds}),
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    stores = [scenes.store.url, damaged.store.url]
    assert [dataset["store"] for dataset in result["datasets"]] == stores
    rows = result["rows"]
    expected = [(store, executor) for store in stores for executor in executors_here()]
    assert [(row["store"], row["executor"]) for row in rows] == expected
    assert told.keys() == {"one core alone"} | {f"{store}, {executor}" for store, executor in expected}
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
        return bound({"storage": storage, "reading": reading, "decoding": decoding})

    assert of(0.0, 0.2, 0.95) == "decoding"
    assert of(0.9, 0.05, 0.3) == "storage"
    assert of(0.1, 0.85, 0.9) == "reading"
    assert of(0.5, 0.45, 0.6) == "storage"  # its thread has no time left
    assert of(0.1, 0.2, 0.4) is None


def test_a_dataset_of_bad_samples_has_no_floor(scenes: Dataset, tmp_path: Path) -> None:
    damaged = copy_damaged(scenes, tmp_path / "damaged", list(range(scenes.samples)))
    with pytest.raises(UserError, match="none of 70 samples decodes"):
        bench_loader(make_plan(damaged, executors=["cpu"]), lambda what, seconds: None)
