"""What a dataset of a million shards costs to open, to order and to plan, in seconds and in memory.

    python benchmarks/scale.py [--shards 1000000] [--samples 10000]

The dataset is simulated: its manifest and its table of shards are real, written as a build writes them; its
tars do not exist, and every shard has the same index, made in memory. All is measured in a fresh process
without torch first, then with it. Prints tables, and writes them to benchmarks/results/<date>-scale.md and .json.
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

ROOT = Path(__file__).parents[1]
B, V, K = 4096, 1024, 128
WORLD_SIZES = (1, 8, 64, 1024)
SAMPLE_BYTES = 110_000  # as ImageNet's
memory: list[dict[str, Any]] = []
times: list[dict[str, Any]] = []


def remember_memory(when: str) -> None:
    """Megabytes of this process now, and its peak since the last call."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    mb = {words[0]: round(int(words[1]) * 1024 / 1e6) for words in lines if words[-1:] == ["kB"]}
    anonymous = mb["RssAnon:"] + mb["RssShmem:"]
    memory.append({"when": when, "resident": mb["VmRSS:"], "anonymous": anonymous, "peak": mb["VmHWM:"]})
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, proc(5)


def clock(what: str, calls: Iterator[Callable[[], object]]) -> None:
    """Milliseconds of each call; what the iterator does in between does not count."""
    ms = []
    for call in calls:
        begin = time.perf_counter()
        call()
        ms.append((time.perf_counter() - begin) * 1e3)
    row = {"what": what, "median_ms": round(statistics.median(ms), 3), "max_ms": round(max(ms), 3)}
    times.append({**row, "count": len(ms)})


def simulate(folder: str, shards: int, samples: int) -> None:
    """Write manifest and table of a dataset of so many shards, each with so many samples."""
    import numpy as np
    import pyarrow as pa

    from pipeline.manifest import SHARDS_SCHEMA, write_dataset
    from pipeline.storage import open_store

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
    """The index of a shard of so many samples of the same size."""
    import numpy as np
    import pyarrow as pa

    from pipeline.manifest import INDEX_SCHEMA
    from pipeline.parquet import to_parquet

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
    """Print as JSON what it takes to open the dataset in `folder`, and to order and plan its steps."""
    remember_memory("Python")
    import numpy as np

    from pipeline.manifest import open_dataset
    from pipeline.order import Order

    remember_memory("imports of pipeline/, without torch")
    opened = []
    clock("open_dataset", iter([lambda: opened.append(open_dataset(folder))]))
    dataset = opened[0]
    remember_memory("opened")

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
    remember_memory("ordered")

    data = index_file(int(dataset.shard_samples[0]))
    shards = rng.choice(dataset.manifest.shards, V, replace=False).tolist()
    clock("take in a shard's index", (lambda s=s: dataset.index(s, lambda _: data) for s in shards))
    remember_memory(f"indexes of {V} shards taken in, INDEX_BYTES kept")

    from pipeline.reader import Reader

    remember_memory("torch imported")

    class Stored:
        """In the fetcher's place: indexes are here at once, samples never come."""

        def whole(self, _name: str) -> "Future[memoryview]":
            answer: Future[memoryview] = Future()
            answer.set_result(memoryview(data))
            return answer

    for world_size in WORLD_SIZES:
        start = 7 * epoch - 40  # two blocks of each lane, so as many as are held at once
        reader = Reader(dataset, order, world_size // 2, world_size, start, 8 * epoch, 1 << 40)
        reader.close()
        reader.fetcher = Stored()  # type: ignore[assignment]

        def plan(first: int, stop: int, reader: Any = reader) -> Iterator[Callable[[], object]]:
            return (lambda step=step: reader._plan(step, wait=True) for step in range(first, stop))

        clock(f"plan: a run's first step, W = {world_size}", plan(start, start + 1))
        clock(f"plan: a run's second step, W = {world_size}", plan(start + 1, start + 2))
        clock(f"plan: steps after that, W = {world_size}", plan(start + 2, 7 * epoch))
        clock(f"plan: the first step of an epoch, W = {world_size}", plan(7 * epoch, 7 * epoch + 1))
        remember_memory(f"planned 41 steps, W = {world_size}")
    print(json.dumps({"memory_mb": memory, "times": times}))


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def report(found: dict[str, Any], title: str) -> str:
    """The tables as Markdown; rich prints the same."""
    lines = [f"# {title}", "", *(f"- {k}: {found[k]}" for k in ("date", "cpu", "command")), ""]
    lines += ["| what | median ms | max ms | of |", "|---|---:|---:|---:|"]
    lines += ["| {what} | {median_ms} | {max_ms} | {count} |".format(**row) for row in found["times"]]
    lines += [
        "",
        "| memory, MB | resident | anonymous and shared | peak on the way |",
        "|---|---:|---:|---:|",
    ]
    lines += ["| {when} | {resident} | {anonymous} | {peak} |".format(**row) for row in found["memory_mb"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=10_000, help="of each shard")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure)

    from rich.console import Console
    from rich.markdown import Markdown

    with tempfile.TemporaryDirectory() as folder:
        simulate(folder, options.shards, options.samples)
        fresh = [sys.executable, __file__, "--measure", folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(fresh, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    today = date.today().isoformat()
    command = " ".join(["python", os.path.relpath(__file__, ROOT), *sys.argv[1:]])
    found = {"date": today, "cpu": cpu(), "command": command, **json.loads(done.stdout)}
    title = f"{options.shards:,} shards of {options.samples:,} samples (B = {B}, V = {V}, K = {K})"
    text = report(found, title.replace(",", " "))
    Console().print(Markdown(text))
    results = ROOT / "benchmarks/results" / f"{today}-scale"
    results.with_suffix(".md").write_text(text)
    results.with_suffix(".json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return None


if __name__ == "__main__":
    main()
