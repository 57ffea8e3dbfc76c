"""How fast images become shards, beside what the disk, the decoder and webdataset's own writer make of the same files.

    python -m benchmarks.sharding [--images DIR] [--samples 20000] [--rounds 3]

DIR: a folder of class folders of JPEGs; none: drawn scenes; repeated until there are so many samples, in the page
cache. In turn, in each round; reported are medians, and the median over rounds of each ratio:

- copy: `cp -r` of the tree, then `sha256sum` of the copies: nothing is shuffled, packed or indexed.
- header, decode: `maestream shards build` with as many tasks as there are cores, each of them up already (starting Ray
  is told apart); every image's header looked at, or every image decoded.
- floor: as many processes as there are cores, each of which does nothing but decode the same files in full.
- floor, an eighth: the same at an eighth of the size in each direction, as the check does, which reads all of a file, too.
- shorter side 256: `maestream shards build --shorter-side 256`.
- webdataset: its ShardWriter in one process, which reads the files in order, and shuffles, checks and indexes nothing.

Then memory, of the driver and of its largest task, at 10,000 and 100,000 images of 4 kB.
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
from benchmarks.report import RESULTS
from cluster.sharding import ray_tasks
from pipeline.ahead import Run
from pipeline.bench import cpu_model
from pipeline.cores import available_cores
from pipeline.images import Changes
from pipeline.shards import build
from pipeline.storage import open_store
from pipeline.write import Options

CLASSES = 100
MEMORY_IMAGES = (10_000, 100_000)
RATIOS = [
    ("header ÷ copy", "header", "copy", 0.8),
    ("decode ÷ floor", "decode", "floor", 0.9),
    ("decode ÷ floor, an eighth", "decode", "floor, an eighth", None),
    ("header ÷ webdataset", "header", "webdataset", 1.5),
    ("shorter side 256 ÷ floor", "shorter side 256", "floor", None),
]


def make_tree(images: list[bytes], samples: int, folder: Path) -> int:
    """Class folders of so many files. Returns their bytes."""
    total = 0
    for i in range(samples):
        path = folder / f"class-{i % CLASSES:03d}" / f"{i:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = images[i % len(images)] + i.to_bytes(8, "little")  # behind the image: no two are the same
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


def measure(tree: Path, samples: int, folder: Path, run: Run, pool: ProcessPoolExecutor) -> dict[str, float]:
    """Images a second of each."""
    files = sorted(tree.rglob("*.jpg"))
    cores = available_cores()
    out = folder / "out"

    def copy() -> None:
        subprocess.run(["cp", "-r", tree, out], check=True)
        subprocess.run(f"find {out} -type f -print0 | xargs -0 sha256sum > /dev/null", shell=True, check=True)

    def ours(options: Options) -> Callable[[], object]:
        return lambda: build(str(tree), open_store(str(out)), options, run=run)

    def decode(scale: int) -> None:
        list(pool.map(decode_part, [files[i::cores] for i in range(cores)], [scale] * cores))

    contestants: dict[str, Callable[[], object]] = {
        "copy": copy,
        "header": ours(Options(check="header")),
        "decode": ours(Options()),
        "floor": lambda: decode(1),
        "floor, an eighth": lambda: decode(8),
        "shorter side 256": ours(Options(changes=Changes(shorter_side=256))),
        "webdataset": lambda: write_webdataset(tree, out),
    }
    rates = {}
    for name, contestant in contestants.items():
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(["sync"], check=True)  # what others left to be written is not this one's
        begin = time.perf_counter()
        contestant()
        rates[name] = samples / (time.perf_counter() - begin)
    shutil.rmtree(out, ignore_errors=True)
    return rates


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Megabytes that are their own of this process, and of the largest task below it."""
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
    """In a process of its own, so that it does not begin with what the rest has used."""
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
@click.option("--images", help="Folder of JPEGs; drawn scenes without it.")
@click.option("--samples", type=click.IntRange(min=100), default=20_000, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--only-memory", hidden=True)
def main(images: str | None, samples: int, rounds: int, only_memory: str | None) -> None:
    """Rates and memory of `maestream shards build`."""
    if only_memory:
        out = open_store(f"{only_memory}-out")
        with peak_memory() as peak, ray_tasks(None) as run:
            build(only_memory, out, Options(shard_bytes=8 << 20), run=run)
        shutil.rmtree(out.root)
        print(json.dumps(peak))
        return
    console = Console()
    with tempfile.TemporaryDirectory(prefix="maestream-bench-", dir=".") as temporary:
        folder = Path(temporary)
        total = make_tree(read_images(images), samples, folder / "tree")
        measured = []
        begin = time.perf_counter()
        with ray_tasks(None) as run, ProcessPoolExecutor(available_cores()) as pool:
            start_s = time.perf_counter() - begin
            for nth in track(range(rounds + 1), "rounds"):
                rates = measure(folder / "tree", samples, folder, run, pool)
                if nth:  # the first one warms everything up
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
    for name, _, _, bar in RATIOS:
        table.add_row(name, f"{result[name]:.2f}", "" if bar is None else f"bar: {bar}")
    for name, peak in memory.items():
        table.add_row(f"memory, {name}", f"driver {peak['driver']:.0f} MB", f"a task {peak['task']:.0f} MB")
    console.print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{result['date']}-sharding.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"→ {path}")


if __name__ == "__main__":
    main()
