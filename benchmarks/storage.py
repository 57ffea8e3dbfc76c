"""Our reads from S3 beside plain concurrent ranged reads, and beside local files; bytes that are read.

    make bench-storage IMAGES=DIR       DIR: a folder of JPEGs, or of class folders; none: drawn scenes

runs it beside the tests' S3 server, all on the cores of this machine. Rounds in turn; reported are medians, and the
median over rounds of each ratio.

- cold: `pipeline.reader` through two epochs with nothing kept (nothing is decoded, checksums are computed) against
  fsspec's `cat_ranges` of the same shards in 8 MiB ranges, 16 at once. Both in memory that they have already, so the
  second epoch is ours. The first has the start in it: small reads for the samples of the first batch, so that it comes
  soon, each of which costs this server 10 ms of a core; and all memory is had from the system, which is as dear as
  reading.
- cached: a whole loader from S3 with all of the dataset kept, against the same loader from local files.
- bytes: read for the first batch of 4096 (by the time it is complete) over its own; read in an epoch by all
  workers together over the dataset's.
"""

import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.datasets import build_repeated, make_order
from benchmarks.report import RESULTS
from pipeline.bench import cpu_model
from pipeline.cores import available_cores
from pipeline.decode import make_decoder
from pipeline.loader import Loader
from pipeline.manifest import Dataset, open_dataset
from pipeline.reader import Reader
from pipeline.storage import open_store

BATCH, ROUNDS, RANGE_BYTES, AT_ONCE = 64, 4, 8 << 20, 16
BUCKET = "s3://maestream/bench-storage"


def make_datasets(images: str | None, samples: int, folder: Path) -> tuple[Dataset, Dataset]:
    """The same shards in a local folder and in the bucket."""
    local, remote = build_repeated(images, samples, folder).store, open_store(BUCKET)
    remote.remove(remote.names())
    for name in track(sorted(local.names(), key=lambda n: n == "manifest.json"), "copying to S3"):
        remote.fs.put_file(local.path(name), remote.path(name))
    return open_dataset(local.url), open_dataset(remote.url)


def plain_reads(dataset: Dataset) -> float:
    """MB/s of fsspec's own concurrent ranged reads of all shards."""
    store, begin, total = dataset.store, time.perf_counter(), 0
    for shard, size in enumerate(dataset.shard_bytes.tolist()):
        starts = list(range(0, size, RANGE_BYTES))
        ends = [min(start + RANGE_BYTES, size) for start in starts]
        paths = [store.path(dataset.shard_name(shard))] * len(starts)
        got = store.fs.cat_ranges(paths, starts, ends, batch_size=AT_ONCE, on_error="raise")
        total += sum(map(len, got))
    return total / (time.perf_counter() - begin) / 1e6


def cold_reads(dataset: Dataset) -> list[float]:
    """MB/s of our reader in each of two epochs."""
    order = make_order(dataset, BATCH)
    bound = Loader(dataset, order, make_decoder("auto", 224, 1), 0, 1).bound_bytes
    reader = Reader(dataset, order, 0, 1, 0, 2 * order.steps_per_epoch, bound)
    reader.fetcher.whole("manifest.json").result()  # it is up
    rates = []
    for epoch in range(2):
        begin, before = time.perf_counter(), reader.fetcher.storage_bytes
        for step in range(order.steps_per_epoch):
            reader.read(epoch * order.steps_per_epoch + step)
        rates.append((reader.fetcher.storage_bytes - before) / (time.perf_counter() - begin) / 1e6)
    reader.close()
    return rates


def images_per_second(dataset: Dataset, cache: tuple[str, int] | None) -> float:
    """Of the second of two epochs of a whole loader."""
    order = make_order(dataset, BATCH)
    loader = Loader(dataset, order, make_decoder("auto", 224, available_cores()), 0, 1, cache)
    begin = 0.0
    for batch in loader.steps(0, 2 * order.steps_per_epoch):
        if batch.step == order.steps_per_epoch:
            begin = time.perf_counter()
    took = time.perf_counter() - begin
    loader.close()
    return (order.steps_per_epoch - 1) * BATCH / took


def first_batch_bytes(dataset: Dataset) -> float:
    """Read for the first batch of 4096 at world size 1, indexes too, over its own bytes."""
    order = make_order(dataset, 4096)
    reader = Reader(dataset, order, 0, 1, 0, 1, 0)
    own = reader.read(0).located.size.sum()
    reader.close()
    return reader.fetcher.storage_bytes / int(own)


def epoch_bytes(dataset: Dataset, world_size: int) -> float:
    """Read in an epoch by all workers together, indexes too, over the shards' bytes."""
    order, total = make_order(dataset, BATCH), 0
    for rank in range(world_size):
        bound = Loader(dataset, order, make_decoder("auto", 224, 1), rank, world_size).bound_bytes
        reader = Reader(dataset, order, rank, world_size, 0, order.steps_per_epoch, bound)
        for step in range(order.steps_per_epoch):
            reader.read(step)
        reader.close()
        total += reader.fetcher.storage_bytes
    return total / int(dataset.shard_bytes.sum())


@click.command()
@click.option("--images", help="A folder of JPEGs; none: drawn scenes.")
@click.option("--samples", default=9600, help="How many, with repeats.")
def main(images: str | None, samples: int) -> None:
    console = Console()
    with tempfile.TemporaryDirectory(prefix="maestream-bench-") as temporary:
        folder = Path(temporary)
        local, remote = make_datasets(images, samples, folder)
        rounds = []
        for nth in track(range(ROUNDS), "rounds"):
            measured = {"plain reads, MB/s": plain_reads(remote)}
            measured["our reads, first epoch, MB/s"], measured["our reads, cold, MB/s"] = cold_reads(remote)
            cache = (str(folder / "kept"), 1 << 40)
            measured["loader, local files, img/s"] = images_per_second(local, None)
            measured["loader, S3 cached, img/s"] = images_per_second(remote, cache)
            if nth:  # the first one warms everything up
                rounds.append(measured)
        result = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python -m benchmarks.storage", *sys.argv[1:]]),
            "cpu": cpu_model(),
            "cores": available_cores(),
            "samples": local.samples,
            "mean_sample_bytes": round(local.mean_sample_bytes),
            "rounds": rounds,
            "cold ÷ plain": _median_ratio(rounds, "our reads, cold, MB/s", "plain reads, MB/s"),
            "first epoch ÷ plain": _median_ratio(rounds, "our reads, first epoch, MB/s", "plain reads, MB/s"),
            "cached ÷ local": _median_ratio(rounds, "loader, S3 cached, img/s", "loader, local files, img/s"),
            "first batch of 4096, bytes ÷ its own": first_batch_bytes(remote),
            **{f"epoch, W = {w}, bytes ÷ dataset": epoch_bytes(remote, w) for w in (1, 3, 8)},
        }
    table = Table("what", "median", title="storage")
    for name in rounds[0]:
        table.add_row(name, f"{statistics.median(r[name] for r in rounds):,.0f}")
    for name, value in result.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.3f}")
    console.print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{result['date']}-storage.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"→ {path}")


def _median_ratio(rounds: list[dict[str, float]], ours: str, theirs: str) -> float:
    return statistics.median(r[ours] / r[theirs] for r in rounds)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
