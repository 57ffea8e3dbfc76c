"""Our loader against what people use today: same JPEGs, same crops, same two cores, one run.

    make bench-peers IMAGES=DIR         DIR: a folder of JPEGs, or of class folders; none: drawn scenes

Every contestant is a process of its own in an environment of its own (see `benchmarks.contestant`), pinned to the
same cores. Peers first try 1 to 4 workers, and keep what was fastest. Then come rounds: each runs every
contestant once, in another order, so that what the machine does meanwhile hits all of them. Reported are the
median rate of each, and the median over rounds of ours divided by it.

What is the same for all: the files' bytes, in files or in shards, in the page cache; the crop boxes and flips, from
`pipeline.augment`; bicubic with antialiasing to 224 × 224; uint8[B, 3, 224, 224] with sample ids out, in the main
process. That the crops are the same is checked on points of each image. DALI's reader cannot be handed boxes:
it draws its own by the same law.

What it made stays in runs/bench-peers, so that one contestant can be run again by hand:

    .venv/bin/python -m benchmarks.contestant ours runs/bench-peers 64 2
"""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from benchmarks.datasets import read_images
from benchmarks.plan import PASSES, SEED, Plan, save_plan
from benchmarks.report import DECODER_ALONE, OURS, YARDSTICK, write_report
from pipeline.augment import random_flips, random_resized_crops
from pipeline.images import check_image
from pipeline.manifest import open_dataset
from pipeline.shards import build
from pipeline.storage import open_store
from pipeline.write import Options

CORES = 2
TRIED_WORKERS = (1, 2, 3, 4)
SHARDS = 12  # about; several for each worker
FOLDER = Path("runs/bench-peers")
QUIET = 0.1  # cores, that others may use during a run
ATTEMPTS = 3  # at a quiet run
TIMEOUT_S = 300  # of one contestant; it takes some 15 s


@dataclass(frozen=True)
class Contestant:
    title: str
    name: str  # in benchmarks.contestant
    python: str  # its environment's
    workers: tuple[int, ...]  # to try


def contestants() -> list[Contestant]:
    simd, pillow = (f".venv-peers-{pil}/bin/python" for pil in ("simd", "pillow"))
    return [
        Contestant(OURS, "ours", sys.executable, (CORES,)),
        Contestant(DECODER_ALONE[0], "our decoder", sys.executable, (1,)),
        Contestant(DECODER_ALONE[1], "our decoder", sys.executable, (CORES,)),
        Contestant(YARDSTICK, "imagefolder", pillow, TRIED_WORKERS),
        Contestant("ImageFolder + DataLoader, pillow-simd", "imagefolder", simd, TRIED_WORKERS),
        Contestant("webdataset + DataLoader, Pillow", "webdataset", pillow, TRIED_WORKERS),
        Contestant("webdataset + DataLoader, pillow-simd", "webdataset", simd, TRIED_WORKERS),
        Contestant("SPDL, a task an image, pillow-simd", "spdl", simd, TRIED_WORKERS),
        Contestant("SPDL, a task a batch, pillow-simd", "spdl batches", simd, TRIED_WORKERS),
        Contestant("DALI webdataset reader, CPU", "dali", simd, TRIED_WORKERS),
    ]


def prepare(images: str | None, samples: int) -> None:
    """Copies of the images as files and as shards, `samples` in all, and the crops of each."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    encoded = [data for data in read_images(images)[:samples] if check_image(data).extension == "jpg"]
    for i in range(samples):
        path = FOLDER / f"images/{i % len(encoded):04d}/{i // len(encoded):04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded[i % len(encoded)])
    shards = str(FOLDER / "shards")
    shard_bytes = sum(map(len, encoded)) * samples // len(encoded) // SHARDS
    build(str(FOLDER / "images"), open_store(shards), Options(shard_bytes=shard_bytes, strict=True))
    dataset = open_dataset(shards)
    ids = np.arange(dataset.samples)
    located = dataset.locate(ids)
    size = (located.height, located.width)
    plan = Plan(
        FOLDER,
        np.array(dataset.keys(ids)),
        np.stack([random_resized_crops(SEED, epoch, ids, *size) for epoch in range(PASSES)]),
        np.stack([random_flips(SEED, epoch, ids) for epoch in range(PASSES)]),
    )
    save_plan(plan)
    write_dali_index(plan, located.shard, located.offset, located.size)
    os.sync()  # or the first contestant has the disk beside it


def write_dali_index(plan: Plan, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> None:
    """What DALI's wds2idx (format v1.2) writes beside each shard, of the images alone."""
    for number, tar in enumerate(plan.shards):
        lines = [f"jpg {offset[i]} {size[i]} {plan.keys[i]}.jpg" for i in np.flatnonzero(shard == number)]
        Path(tar).with_suffix(".idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")


def run(contestant: Contestant, batch: int, workers: int) -> dict[str, Any]:
    """What one process of it measured, on the cores that it inherits from this one. Done again, and the quietest
    kept, if others used those cores meanwhile."""
    command = [contestant.python, "-m", "benchmarks.contestant", contestant.name, str(FOLDER), str(batch)]
    results = []
    while len(results) < ATTEMPTS and all(result["others"] > QUIET for result in results):
        ended = subprocess.run([*command, str(workers)], stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
        if ended.returncode != 0:
            raise click.ClickException(
                f"{contestant.title} with {workers} workers: exit code {ended.returncode}"
            )
        results.append(json.loads(ended.stdout.splitlines()[-1]))
    return min(results, key=lambda result: result["others"])


def crops_apart(reference: np.ndarray) -> float | None:
    """Mean absolute difference, in grey levels, of the points that the last contestant kept from those of ours.
    None where it does not know its samples. Some 40 for other crops."""
    points = np.load(FOLDER / "points.npy").astype(int)
    both = points.any((1, 2, 3)) & reference.any((1, 2, 3))
    return float(np.abs(points - reference)[both].mean()) if both.any() else None


@click.command()
@click.option("--images", type=click.Path(exists=True), help="a folder of JPEGs; drawn scenes without it")
@click.option(
    "--samples", default=4096, show_default=True, help="images in a pass; copies where there are fewer"
)
@click.option("--batch", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(images: str | None, samples: int, batch: int, rounds: int) -> None:
    """Measure our loader against its peers."""
    console = Console(width=max(Console().width, 120))  # the table's
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    console.print(f"preparing {samples} images in {FOLDER}")
    prepare(images, samples)
    everyone = contestants()

    console.print("trying numbers of workers, img/s")
    best, tried, versions, apart = {}, {}, {}, {}
    for contestant in everyone:
        title = contestant.title
        rates = {}
        for workers in contestant.workers:
            result = run(contestant, batch, workers)
            rates[workers] = result["rate"]
            if contestant.name == "ours":
                reference = np.load(FOLDER / "points.npy").astype(int)
            apart[title] = crops_apart(reference)
        best[title], tried[title], versions[title] = (
            max(rates, key=rates.__getitem__),
            rates,
            result["versions"],
        )
        console.print(f"  {title}: " + ", ".join(f"{w}: {rate:,.0f}" for w, rate in rates.items()))

    measured = []
    for number in range(rounds):
        in_turn = random.Random(number).sample(everyone, len(everyone))
        results = {c.title: run(c, batch, best[c.title]) for c in in_turn}
        measured.append(
            {title: {k: result[k] for k in ("rate", "cores", "others")} for title, result in results.items()}
        )
        console.print(f"round {number + 1} of {rounds}: {OURS} {results[OURS]['rate']:,.0f} img/s")

    write_report(
        {
            "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
            "arguments": {"images": images, "samples": samples, "batch": batch, "rounds": rounds},
            "cores": CORES,
            "quiet": QUIET,
            "workers": best,
            "tried": tried,
            "crops_apart": apart,
            "versions": versions,
            "rounds": measured,
        },
        console,
    )


if __name__ == "__main__":
    main()
