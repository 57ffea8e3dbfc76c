"""Compare our reads from S3 with plain concurrent range requests and with local files, and count the bytes read.

    make bench-storage IMAGES=DIR       DIR: a folder of JPEGs or of class folders; without it, synthetic scenes

This runs it with the tests' S3 server, all on the cores of this machine. All are measured in turn in each round. The
report gives medians, and the median over rounds of each ratio.

- cold: `pipeline.loading.readahead` over two epochs without a disk cache (no decoding, but checksums) against fsspec's
  `cat_ranges` of the same shards in 8 MiB ranges, 16 at once. The ratio uses our second epoch, in which both have
  their memory already. The first epoch includes the start: small reads for the first batch, so that it is complete soon,
  each of which costs this server 10 ms of a core; and all memory has to be allocated, which takes as long as reading.
- cached: the whole loader on S3 with the whole dataset in the disk cache, against the same loader on local files.
- bytes: bytes read until the first batch of 4096 is complete, divided by the batch's size; and bytes read by all workers
  together in an epoch, divided by the size of the dataset.
"""

import datetime
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
from benchmarks.output import save_result
from pipeline.cpus import available_cores
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.factory import make_decoder
from pipeline.loading.benchmark import cpu_model
from pipeline.loading.loader import Loader
from pipeline.loading.order import Schedule
from pipeline.loading.readahead import Reader
from pipeline.storage.store import open_store

BATCH, ROUNDS, RANGE_BYTES, AT_ONCE = 64, 4, 8 << 20, 16
BUCKET = "s3://maestream/bench-storage"


def make_datasets(images: str | None, samples: int, folder: Path) -> tuple[Dataset, Dataset]:
    """Build the same dataset in a local folder and in the bucket."""
    local, remote = build_repeated(images, samples, folder).store, open_store(BUCKET)
    remote.remove(remote.names())
    for name in track(sorted(local.names(), key=lambda n: n == "manifest.json"), "copying to S3"):
        remote.fs.put_file(local.path(name), remote.path(name))
    return open_dataset(local.url), open_dataset(remote.url)


def plain_reads(dataset: Dataset) -> float:
    """MB/s of fsspec's concurrent range requests for all shards."""
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
    lane_bytes = Loader(dataset, order, make_decoder("auto", 224, 1), 0, 1).lane_bytes
    reader = Reader(dataset, order, Schedule.constant(0, 1), 0, 2 * order.steps_per_epoch, lane_bytes)
    reader.fetcher.read_file("manifest.json").result()  # wait until the fetch process has started
    rates = []
    for epoch in range(2):
        begin, before = time.perf_counter(), reader.fetcher.storage_bytes
        for step in range(order.steps_per_epoch):
            reader.read(epoch * order.steps_per_epoch + step)
        rates.append((reader.fetcher.storage_bytes - before) / (time.perf_counter() - begin) / 1e6)
    reader.close()
    return rates


def images_per_second(dataset: Dataset, cache: tuple[str, int] | None) -> float:
    """Images per second of the whole loader, in the second of two epochs."""
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
    """Bytes read for the first batch of 4096 at world size 1, with indexes, divided by the batch's size."""
    order = make_order(dataset, 4096)
    reader = Reader(dataset, order, Schedule.constant(0, 1), 0, 1, 0)
    own = reader.read(0).located.size.sum()
    reader.close()
    return reader.fetcher.storage_bytes / int(own)


def epoch_bytes(dataset: Dataset, world_size: int) -> float:
    """Bytes read in an epoch by all workers together, with indexes, divided by the size of the shards."""
    order, total = make_order(dataset, BATCH), 0
    for rank in range(world_size):
        workers = Schedule.constant(rank, world_size)
        lane_bytes = Loader(dataset, order, make_decoder("auto", 224, 1), rank, world_size).lane_bytes
        reader = Reader(dataset, order, workers, 0, order.steps_per_epoch, lane_bytes)
        for step in range(order.steps_per_epoch):
            reader.read(step)
        reader.close()
        total += reader.fetcher.storage_bytes
    return total / int(dataset.shard_bytes.sum())


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--images", help="Folder of JPEGs. Without it, synthetic scenes.")
@click.option("--samples", default=9600, show_default=True, help="Size of the dataset, with repeats.")
def main(images: str | None, samples: int) -> None:
    console = Console()
    with tempfile.TemporaryDirectory(prefix="maestream-bench-") as temporary:
        folder = Path(temporary)
        local, remote = make_datasets(images, samples, folder)
        rounds = []
        for nth in track(range(ROUNDS), "rounds"):
            measured = {"plain reads, MB/s": plain_reads(remote)}
            measured["our reads, first epoch, MB/s"], measured["our reads, cold, MB/s"] = cold_reads(remote)
            cache = (str(folder / "cache"), 1 << 40)
            measured["loader, local files, img/s"] = images_per_second(local, None)
            measured["loader, S3 cached, img/s"] = images_per_second(remote, cache)
            if nth:  # the first round is the warm-up
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
    console.print(save_result(f"{result['date']}-storage", result))


def _median_ratio(rounds: list[dict[str, float]], ours: str, theirs: str) -> float:
    return statistics.median(r[ours] / r[theirs] for r in rounds)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
