"""Compare our loader with other data loaders: same JPEGs, same crops, same two cores.

    make bench-peers IMAGES=DIR         DIR: a folder of JPEGs or of class folders; without it, synthetic scenes

Every loader runs in its own process and Python environment (see `benchmarks.peers.contestant`), pinned to the same cores.
First, the other loaders are tried with 1 to 4 workers, and the fastest number is kept. Then follow rounds; each runs
every loader once, in a different order, so that disturbances hit all of them alike. The report gives the median rate of
each loader, and the median over rounds of our rate divided by its rate.

The same for all: the image files (in files or in shards, in the page cache); crop boxes and flips from
`pipeline.loading.crops`; bicubic resizing with antialiasing to 224 × 224; uint8[B, 3, 224, 224] batches with sample ids in
the main process. Pixels of each image are compared to make sure that the crops are the same. DALI's reader does not
accept boxes; it draws its own from the same distribution.

The input stays in runs/bench-peers, so that a single loader can be run again by hand:

    .venv/bin/python -m benchmarks.peers.contestant ours runs/bench-peers 64 2
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
from benchmarks.peers.plan import PASSES, SEED, Plan, save_plan
from benchmarks.peers.report import BASELINE, DECODER_ALONE, OURS, write_report
from pipeline.build.build import build
from pipeline.build.shard_writer import BuildOptions
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.image_check import check_image
from pipeline.loading.crops import random_flips, random_resized_crops
from pipeline.storage.store import open_store

CORES = 2
TRIED_WORKERS = (1, 2, 3, 4)
SHARDS = 12  # about; several per worker
FOLDER = Path("runs/bench-peers")
QUIET = 0.1  # cores that other processes may use during a run
ATTEMPTS = 3  # to get such a quiet run
TIMEOUT_S = 300  # of one run, which takes about 15 s


@dataclass(frozen=True)
class Contestant:
    """A loader to measure."""

    title: str
    name: str  # in benchmarks.peers.contestant
    python: str  # interpreter of its environment
    workers: tuple[int, ...]  # numbers of workers to try


def contestants() -> list[Contestant]:
    simd, pillow = (f".venv-peers-{pil}/bin/python" for pil in ("simd", "pillow"))
    return [
        Contestant(OURS, "ours", sys.executable, (CORES,)),
        Contestant(DECODER_ALONE[0], "our decoder", sys.executable, (1,)),
        Contestant(DECODER_ALONE[1], "our decoder", sys.executable, (CORES,)),
        Contestant(BASELINE, "imagefolder", pillow, TRIED_WORKERS),
        Contestant("ImageFolder + DataLoader, pillow-simd", "imagefolder", simd, TRIED_WORKERS),
        Contestant("webdataset + DataLoader, Pillow", "webdataset", pillow, TRIED_WORKERS),
        Contestant("webdataset + DataLoader, pillow-simd", "webdataset", simd, TRIED_WORKERS),
        Contestant("SPDL, one image per task, pillow-simd", "spdl", simd, TRIED_WORKERS),
        Contestant("SPDL, one batch per task, pillow-simd", "spdl batches", simd, TRIED_WORKERS),
        Contestant("DALI webdataset reader, CPU", "dali", simd, TRIED_WORKERS),
    ]


def prepare(images: str | None, samples: int) -> None:
    """Write the images, repeated to `samples` in all, as files and as shards, and the plan with the crops."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    encoded = [data for data in read_images(images)[:samples] if check_image(data).extension == "jpg"]
    for i in range(samples):
        path = FOLDER / f"images/{i % len(encoded):04d}/{i // len(encoded):04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded[i % len(encoded)])
    shards = str(FOLDER / "shards")
    shard_bytes = sum(map(len, encoded)) * samples // len(encoded) // SHARDS
    build(str(FOLDER / "images"), open_store(shards), BuildOptions(shard_bytes=shard_bytes, strict=True))
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
    os.sync()  # otherwise these writes would slow down the first loader


def write_dali_index(plan: Plan, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> None:
    """Write the index that DALI's wds2idx (format v1.2) writes next to each shard, of the images only."""
    for number, tar in enumerate(plan.shards):
        lines = [f"jpg {offset[i]} {size[i]} {plan.keys[i]}.jpg" for i in np.flatnonzero(shard == number)]
        Path(tar).with_suffix(".idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")


def run(contestant: Contestant, batch: int, workers: int) -> dict[str, Any]:
    """Run a loader in a process of its own, on the same cores as this process. If other processes used the cores at the same
    time, it is repeated, up to ATTEMPTS times, and the quietest run counts."""
    command = [
        contestant.python,
        "-m",
        "benchmarks.peers.contestant",
        contestant.name,
        str(FOLDER),
        str(batch),
    ]
    results = []
    while len(results) < ATTEMPTS and all(result["others"] > QUIET for result in results):
        ended = subprocess.run([*command, str(workers)], stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
        if ended.returncode != 0:
            raise click.ClickException(
                f"{contestant.title} failed with {workers} workers (exit code {ended.returncode}); see its output above"
            )
        results.append(json.loads(ended.stdout.splitlines()[-1]))
    return min(results, key=lambda result: result["others"])


def crops_apart(reference: np.ndarray) -> float | None:
    """Mean absolute difference in grey levels between the pixels saved by the last run and ours; about 40 for different crops.
    None if that loader does not know its sample ids."""
    points = np.load(FOLDER / "points.npy").astype(int)
    both = points.any((1, 2, 3)) & reference.any((1, 2, 3))
    return float(np.abs(points - reference)[both].mean()) if both.any() else None


@click.command()
@click.option("--images", type=click.Path(exists=True), help="Folder of JPEGs. Without it, synthetic scenes.")
@click.option(
    "--samples", default=4096, show_default=True, help="Images in a pass; repeated if there are fewer."
)
@click.option("--batch", default=64, show_default=True, help="Images in a batch.")
@click.option("--rounds", default=5, show_default=True, help="Measurements of each loader.")
def main(images: str | None, samples: int, batch: int, rounds: int) -> None:
    """Compare our loader with other data loaders."""
    console = Console(width=max(Console().width, 120))  # the table needs 120 columns
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    console.print(f"preparing {samples} images in {FOLDER}")
    prepare(images, samples)
    everyone = contestants()

    console.print("images per second by number of workers:")
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
