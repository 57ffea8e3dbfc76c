"""Measure `maestream shards build`, and for comparison copying, decoding and webdataset's ShardWriter on the same files.

    python -m benchmarks.sharding [--images DIR] [--samples 20000] [--rounds 3]

DIR is a folder of class folders of JPEGs; without it, synthetic scenes are used. The files are repeated up to the number
of samples, and are in the page cache. All are measured in turn in each round. The report gives medians, and the median
over rounds of each ratio:

- copy: `cp -r` of the tree, then `sha256sum` of the copies. Nothing is shuffled, packed or indexed.
- header, decode: `maestream shards build` with as many Ray tasks as cores, checking every image's header, or decoding
  every image. The tasks are running already; the start of Ray is measured separately.
- floor: as many processes as cores, which only decode the same files at full size.
- floor, an eighth: the same at an eighth of the width and height, like the check of `shards build`, which also reads whole
  files.
- shorter side 256: `maestream shards build --shorter-side 256`.
- webdataset: ShardWriter in one process, which reads the files in order and does not shuffle, check or index.

Finally, the memory of the driver and of its largest task, with 10,000 and 100,000 images of 4 kB.
"""

import datetime
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psutil
import webdataset
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.datasets import read_images
from benchmarks.output import save_result
from cluster.runtime.task_pool import task_pool
from pipeline.build.build import build
from pipeline.build.shard_writer import BuildOptions
from pipeline.cpus import available_cores
from pipeline.dataset.image_check import Conversion
from pipeline.loading.benchmark import cpu_model
from pipeline.parallel import ParallelMap
from pipeline.storage.store import open_store

CLASSES = 100
MEMORY_IMAGES = (10_000, 100_000)
RATIOS = [  # name, numerator, denominator, target
    ("header ÷ copy", "header", "copy", 0.8),
    ("decode ÷ floor", "decode", "floor", 0.9),
    ("decode ÷ floor, an eighth", "decode", "floor, an eighth", None),
    ("header ÷ webdataset", "header", "webdataset", 1.5),
    ("shorter side 256 ÷ floor", "shorter side 256", "floor", None),
]


def make_tree(images: list[bytes], samples: int, folder: Path) -> int:
    """Write `samples` files to class folders. Returns their total size in bytes."""
    total = 0
    for i in range(samples):
        path = folder / f"class-{i % CLASSES:03d}" / f"{i:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = images[i % len(images)] + i.to_bytes(
            8, "little"
        )  # appended to the image, so that no two files are the same
        path.write_bytes(data)
        total += len(data)
    return total


def decode_part(paths: list[Path], scale: int) -> None:
    for path in paths:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.draft(None, (image.width // scale, image.height // scale))
            image.load()


def write_webdataset(tree: Path, out: Path) -> None:
    out.mkdir()
    with webdataset.ShardWriter(str(out / "shard-%06d.tar"), maxsize=128 << 20, verbose=0) as writer:
        for path in sorted(tree.rglob("*.jpg")):
            label = str(int(path.parent.name.rpartition("-")[2])).encode()
            writer.write(
                {"__key__": f"{path.parent.name}/{path.stem}", "jpg": path.read_bytes(), "cls": label}
            )


def measure(
    tree: Path, samples: int, folder: Path, run: ParallelMap, pool: ProcessPoolExecutor
) -> dict[str, float]:
    """Images per second of each method."""
    files = sorted(tree.rglob("*.jpg"))
    cores = available_cores()
    out = folder / "out"

    def copy() -> None:
        subprocess.run(["cp", "-r", tree, out], check=True)
        subprocess.run(f"find {out} -type f -print0 | xargs -0 sha256sum > /dev/null", shell=True, check=True)

    def ours(options: BuildOptions) -> Callable[[], object]:
        return lambda: build(str(tree), open_store(str(out)), options, run=run)

    def decode(scale: int) -> None:
        list(pool.map(decode_part, [files[i::cores] for i in range(cores)], [scale] * cores))

    contestants: dict[str, Callable[[], object]] = {
        "copy": copy,
        "header": ours(BuildOptions(check="header")),
        "decode": ours(BuildOptions()),
        "floor": lambda: decode(1),
        "floor, an eighth": lambda: decode(8),
        "shorter side 256": ours(BuildOptions(conversion=Conversion(shorter_side=256))),
        "webdataset": lambda: write_webdataset(tree, out),
    }
    rates = {}
    for name, contestant in contestants.items():
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(["sync"], check=True)  # so that this one does not pay for the writes of the one before
        begin = time.perf_counter()
        contestant()
        rates[name] = samples / (time.perf_counter() - begin)
    shutil.rmtree(out, ignore_errors=True)
    return rates


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Peak private memory (USS) in megabytes, of this process and of its largest task."""
    peak = {"driver": 0.0, "task": 0.0}
    done = threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not done.wait(0.2):
            peak["driver"] = max(peak["driver"], me.memory_full_info().uss / 1e6)
            for child in me.children(recursive=True):
                try:
                    if "write_shard" in " ".join(child.cmdline()):
                        peak["task"] = max(peak["task"], child.memory_full_info().uss / 1e6)
                except psutil.NoSuchProcess:
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def memory_of(images: int, folder: Path) -> dict[str, float]:
    """Peak memory of a build in a process of its own, so that nothing from before counts."""
    with Image.effect_noise((96, 96), 50) as noise:
        buffer = io.BytesIO()
        noise.save(buffer, "JPEG", quality=60)
    tree = folder / f"small-{images}"
    make_tree([buffer.getvalue()], images, tree)
    command = [sys.executable, "-m", "benchmarks.sharding", "--only-memory", str(tree)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(tree)
    return json.loads(done.stdout.splitlines()[-1])


@click.command()
@click.option("--images", help="Folder of JPEGs. Without it, synthetic scenes.")
@click.option(
    "--samples", type=click.IntRange(min=100), default=20_000, show_default=True, help="Number of files."
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Measurements of each."
)
@click.option("--only-memory", hidden=True)
def main(images: str | None, samples: int, rounds: int, only_memory: str | None) -> None:
    """Measure the throughput and memory of `maestream shards build`."""
    if only_memory:
        out = open_store(f"{only_memory}-out")
        with peak_memory() as peak, task_pool(None) as run:
            build(only_memory, out, BuildOptions(shard_bytes=8 << 20), run=run)
        shutil.rmtree(out.root)
        print(json.dumps(peak))
        return
    console = Console()
    with tempfile.TemporaryDirectory(prefix="maestream-bench-", dir=".") as temporary:
        folder = Path(temporary)
        total = make_tree(read_images(images), samples, folder / "tree")
        measured = []
        begin = time.perf_counter()
        with task_pool(None) as run, ProcessPoolExecutor(available_cores()) as pool:
            start_s = time.perf_counter() - begin
            for nth in track(range(rounds + 1), "rounds"):
                rates = measure(folder / "tree", samples, folder, run, pool)
                if nth:  # the first round is the warm-up
                    measured.append(rates)
        memory = {f"{n:,} images": memory_of(n, folder) for n in track(MEMORY_IMAGES, "memory")}
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.sharding", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "samples": samples,
        "mean_bytes": round(total / samples),
        "start_of_ray_s": round(start_s, 1),
        "rounds": measured,
        **{name: statistics.median(r[a] / r[b] for r in measured) for name, a, b, _ in RATIOS},
        "memory_mb": memory,
    }
    table = Table("what", "images/s", "MB/s", title=f"{samples:,} images of {total / samples / 1000:.0f} kB")
    for name in measured[0]:
        rate = statistics.median(r[name] for r in measured)
        table.add_row(name, f"{rate:,.0f}", f"{rate * total / samples / 1e6:,.0f}")
    for name, _, _, target in RATIOS:
        table.add_row(name, f"{result[name]:.2f}", "" if target is None else f"target: {target}")
    for name, peak in memory.items():
        table.add_row(f"memory, {name}", f"driver {peak['driver']:.0f} MB", f"a task {peak['task']:.0f} MB")
    console.print(table)
    console.print(save_result(f"{result['date']}-sharding", result))


if __name__ == "__main__":
    main()
