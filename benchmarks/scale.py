"""Measure the time and memory to open a dataset of a million shards, compute its data order and plan its reads.

    python -m benchmarks.scale [--shards 1000000] [--samples 10000]

The dataset is simulated: its manifest and table of shards are written as by a build, but there are no tars, and all
shards share one index, which is made in memory. Everything is measured in a new process, first without torch and then
with it. Prints tables, and writes them to benchmarks/results/<date>-scale.md and .json.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.output import save_result

ROOT = Path(__file__).parents[1]
B, V, K = 4096, 1024, 128
WORLD_SIZES = (1, 8, 64, 1024)
SAMPLE_BYTES = 110_000  # about ImageNet's mean
memory: list[dict[str, Any]] = []
times: list[dict[str, Any]] = []


def record_memory(when: str) -> None:
    """Record the megabytes of this process now, and its peak since the last call."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    mb = {words[0]: round(int(words[1]) * 1024 / 1e6) for words in lines if words[-1:] == ["kB"]}
    anonymous = mb["RssAnon:"] + mb["RssShmem:"]
    memory.append({"when": when, "resident": mb["VmRSS:"], "anonymous": anonymous, "peak": mb["VmHWM:"]})
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, proc(5)


def clock(what: str, calls: Iterator[Callable[[], object]]) -> None:
    """Record the milliseconds of each call; the time in the iterator itself does not count."""
    ms = []
    for call in calls:
        begin = time.perf_counter()
        call()
        ms.append((time.perf_counter() - begin) * 1e3)
    row = {"what": what, "median_ms": round(statistics.median(ms), 3), "max_ms": round(max(ms), 3)}
    times.append({**row, "count": len(ms)})


def simulate(folder: str, shards: int, samples: int) -> None:
    """Write manifest and table of shards of a dataset with so many shards of so many samples each."""
    import numpy as np
    import pyarrow as pa

    from pipeline.dataset.manifest import SHARDS_SCHEMA, write_dataset
    from pipeline.storage.store import open_store

    rng = np.random.default_rng(0)

    def digests() -> list[str]:
        text = rng.bytes(32 * shards).hex()
        return [text[i : i + 64] for i in range(0, len(text), 64)]

    table = pa.table(
        {
            "name": [f"shard-{shard:06d}.tar" for shard in range(shards)],
            "samples": np.full(shards, samples),
            "bytes": (samples * SAMPLE_BYTES * rng.uniform(0.98, 1.02, shards)).astype(np.int64),
            "sha256": digests(),
            "content": digests(),
        }
    ).cast(SHARDS_SCHEMA)
    write_dataset(open_store(folder), table, shards * samples * (SAMPLE_BYTES - 5000), ["one"], {})


def index_file(samples: int) -> bytes:
    """The index of a shard with so many samples, all of the same size."""
    import numpy as np
    import pyarrow as pa

    from pipeline.dataset.manifest import INDEX_SCHEMA
    from pipeline.storage.parquet import to_parquet

    rng, ones = np.random.default_rng(0), np.ones(samples, np.int64)
    columns = {
        "key": [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}" for i in range(samples)],
        "offset": np.arange(samples) * (SAMPLE_BYTES - 3000) + 512,
        "size": np.full(samples, SAMPLE_BYTES - 5000),
        "label": rng.integers(0, 1000, samples),
        "width": ones * 500,
        "height": ones * 375,
        "crc32c": rng.integers(0, 1 << 32, samples),
    }
    return to_parquet(pa.table(columns).cast(INDEX_SCHEMA))


def measure(folder: str) -> None:
    """Open the dataset in `folder`, and order and plan its steps; print time and memory as JSON."""
    record_memory("Python")
    import numpy as np

    from pipeline.dataset.dataset import open_dataset
    from pipeline.loading.order import Order, Schedule

    record_memory("pipeline imported, without torch")
    opened = []
    clock("open_dataset", iter([lambda: opened.append(open_dataset(folder))]))
    dataset = opened[0]
    record_memory("dataset opened")

    order = Order(dataset.shard_samples, 0, B, V, K)
    rng = np.random.default_rng(0)
    epoch = order.steps_per_epoch
    borders = (lambda e=e: order.step_ids(e * epoch) for e in range(10, 20))
    clock("order: the first step of an epoch, W = 1", borders)

    def steps(world_size: int) -> Iterator[Callable[[], object]]:
        for e in range(100, 105):
            order.step_ids(e * epoch)
            for step, rank in zip(
                rng.integers(epoch, size=200), rng.integers(world_size, size=200), strict=True
            ):
                yield lambda e=e, s=int(step), r=int(rank): order.step_ids(e * epoch + s, r, world_size)

    for world_size in WORLD_SIZES:
        clock(f"order: any step of any rank, W = {world_size}", steps(world_size))
    record_memory("order computed")

    data = index_file(int(dataset.shard_samples[0]))
    shards = rng.choice(dataset.manifest.shards, V, replace=False).tolist()
    clock("parse a shard's index", (lambda s=s: dataset.index(s, lambda _: data) for s in shards))
    record_memory(f"indexes of {V} shards parsed, INDEX_BYTES kept")

    from pipeline.loading.readahead import Reader

    record_memory("torch imported")

    class InstantFetcher:
        """Stands in for the fetch process: returns indexes at once, and never any samples."""

        def read_file(self, _name: str) -> "Future[memoryview]":
            answer: Future[memoryview] = Future()
            answer.set_result(memoryview(data))
            return answer

    for world_size in WORLD_SIZES:
        start = 7 * epoch - 40  # two blocks of each lane, as many as are held at the same time
        reader = Reader(
            dataset, order, Schedule.constant(world_size // 2, world_size), start, 8 * epoch, 1 << 40
        )
        reader.close()
        reader.fetcher = InstantFetcher()  # type: ignore[assignment]

        def plan(first: int, stop: int, reader: Any = reader) -> Iterator[Callable[[], object]]:
            return (lambda step=step: reader._plan(step, wait=True) for step in range(first, stop))

        clock(f"plan: a run's first step, W = {world_size}", plan(start, start + 1))
        clock(f"plan: a run's second step, W = {world_size}", plan(start + 1, start + 2))
        clock(f"plan: steps after that, W = {world_size}", plan(start + 2, 7 * epoch))
        clock(f"plan: the first step of an epoch, W = {world_size}", plan(7 * epoch, 7 * epoch + 1))
        record_memory(f"planned 41 steps, W = {world_size}")
    print(json.dumps({"memory_mb": memory, "times": times}))


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def report(found: dict[str, Any], title: str) -> str:
    """The tables as Markdown."""
    lines = [f"# {title}", "", *(f"- {k}: {found[k]}" for k in ("date", "cpu", "command")), ""]
    lines += ["| operation | median, ms | max, ms | calls |", "|---|---:|---:|---:|"]
    lines += ["| {what} | {median_ms} | {max_ms} | {count} |".format(**row) for row in found["times"]]
    lines += [
        "",
        "| memory, MB | resident | anonymous and shared | peak since the row above |",
        "|---|---:|---:|---:|",
    ]
    lines += ["| {when} | {resident} | {anonymous} | {peak} |".format(**row) for row in found["memory_mb"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=1_000_000, help="number of shards")
    parser.add_argument("--samples", type=int, default=10_000, help="samples per shard")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure)

    from rich.console import Console
    from rich.markdown import Markdown

    with tempfile.TemporaryDirectory() as folder:
        simulate(folder, options.shards, options.samples)
        command = [sys.executable, "-m", "benchmarks.scale", "--measure", folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    today = date.today().isoformat()
    command = " ".join(["python -m benchmarks.scale", *sys.argv[1:]])
    found = {"date": today, "cpu": cpu(), "command": command, **json.loads(done.stdout)}
    title = f"{options.shards:,} shards of {options.samples:,} samples (B = {B}, V = {V}, K = {K})"
    text = report(found, title.replace(",", " "))
    Console().print(Markdown(text))
    print(save_result(f"{today}-scale", found, text))
    return None


if __name__ == "__main__":
    main()
