"""The loader beside a training step: img/s of the executor alone, of the loader, of the step, and of both together.

    python -m benchmarks.gpu --images DIR       # a folder of JPEGs, made into a dataset of --samples, with repeats
    python -m benchmarks.gpu --data DATASET     # that dataset; then neither webdataset nor Ray need be installed

1. slices: whether DALI's on the GPU are the CPU's (pipeline.decode.check). If not, the rest is measured without it.
2. executor: samples in memory, as many batches at once as in the loader; `cpu`, and DALI for each share of the GPU's
   JPEG engines (HW_DECODER_LOAD) and number of host threads.
3. step: a step of the recipe's model on images that are on the device already.
4. loader: all of it, with `cpu` and with the fastest of DALI's.
5. step and loader, with the same, because a GPU that trains decodes more slowly. What the step waits is counted where
   the trainer asks for a batch. The device still has work queued then, so the share of time that it idles is less;
   what it lost to the loader shows against 3.

Results are kept of a GPU only. Without one the same is measured on the CPU, in a minute with

    python -m benchmarks.gpu --recipe recipes/pretrain_vit_tiny.yaml --batch 16 --samples 512 --seconds 2
"""

import datetime
import itertools
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.datasets import build_repeated, make_order
from benchmarks.report import RESULTS, cpu_model
from pipeline.augment import random_flips, random_resized_crops
from pipeline.cores import available_cores
from pipeline.decode import Decoder, Size
from pipeline.decode.check import slices_differ_on
from pipeline.decode.cpu import CpuDecoder
from pipeline.loader import DECODING, Loader, TrainBatch
from pipeline.manifest import Dataset, open_dataset
from pipeline.reader import Samples, read_samples
from trainer.bench import make_bench, resident_batch
from trainer.config import PretrainConfig
from trainer.recipe import load_config

WARM_UP = 8  # steps before the clock starts: pipelines and buffers are made in them
IN_MEMORY = 2048  # samples, for the executor alone
FASTEST = 3  # of DALI's executors, which are measured beside the step
LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
PACKAGES = (
    "torch",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "nvidia-nvimgcodec-cu12",
    "nvidia-nvimgcodec-cu13",
)
COLUMNS = ("decoder", "threads", "hw_decoder_load", "alone", "loader", "with step", "waits")
console = Console(highlight=False, soft_wrap=True)


# ---- measuring ------------------------------------------------------------------------------------------------


def clock(
    batches: Iterable[Any], act: Callable[[Any], object], seconds: float, device: torch.device
) -> tuple[float, float]:
    """Batches a second, and the share of the time that `wait_s` of the batches is."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin = waited = 0.0
    for n, batch in enumerate(batches):
        if n < WARM_UP:
            act(batch)
            begin = now()
            continue
        waited += batch.wait_s
        act(batch)
        if time.perf_counter() - begin > seconds:
            break
    took = now() - begin
    return (n + 1 - WARM_UP) / took, waited / took


def executor_rate(decoder: Decoder, samples: Samples, size: int, batch: int, seconds: float) -> float:
    """Images a second of a decoder by itself."""
    located = samples.located
    boxes = random_resized_crops(0, 0, samples.ids, located.height, located.width)
    flips = random_flips(0, 0, samples.ids)

    def decode(turn: int) -> None:
        chosen = np.arange(turn * batch, (turn + 1) * batch) % len(samples.ids)
        decoded = decoder([samples.encoded[i] for i in chosen], boxes[chosen], flips[chosen])
        assert not decoded.bad, decoded.bad

    with ThreadPoolExecutor(DECODING) as pool:
        turns = itertools.count()
        for _ in pool.map(decode, itertools.islice(turns, 2 * DECODING)):
            pass
        begin, done = time.perf_counter(), 0
        under_way = deque(pool.submit(decode, next(turns)) for _ in range(DECODING))
        while time.perf_counter() - begin < seconds:
            under_way.popleft().result()
            under_way.append(pool.submit(decode, next(turns)))
            done += 1
        return done * batch / (time.perf_counter() - begin)


# ---- what is measured -----------------------------------------------------------------------------------------


def executors(device: torch.device, dali: bool) -> list[dict[str, Any]]:
    cores = available_cores()
    found: list[dict[str, Any]] = [{"decoder": "cpu", "threads": cores, "hw_decoder_load": None}]
    if dali:
        loads = LOADS if device.type == "cuda" else (0.0,)
        tried = sorted({max(1, cores // 4), max(1, cores // 2), cores})
        found += [{"decoder": "dali", "threads": t, "hw_decoder_load": s} for t in tried for s in loads]
    return found


def make(executor: dict[str, Any], size: Size, device: torch.device) -> Decoder:
    if executor["decoder"] == "cpu":
        return CpuDecoder(size, executor["threads"])
    from pipeline.decode import dali

    dali.HW_DECODER_LOAD = executor["hw_decoder_load"]
    return dali.DaliDecoder(size, executor["threads"], device)


def measure(dataset: Dataset, config: PretrainConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    batch, size = config.global_batch, config.model.size
    found: dict[str, Any] = {"batch": batch}
    try:
        import nvidia.dali  # noqa: F401

        found["slices"] = slices_differ_on(device) or "the CPU's"
    except ImportError:
        found["slices"] = "DALI is not installed"
    console.print(f"DALI's slices on {device}: {found['slices']}")

    samples = read_samples(dataset, np.arange(min(dataset.samples, IN_MEMORY)))
    found["executors"] = executors(device, found["slices"] == "the CPU's")
    for executor in found["executors"]:
        with closing(make(executor, size, device)) as decoder:
            executor["alone"] = executor_rate(decoder, samples, size, batch, seconds)
        console.print(str(executor))

    def batches(executor: dict[str, Any]) -> Iterable[TrainBatch]:
        loader = Loader(dataset, make_order(dataset, batch), make(executor, size, device), 0, 1)
        with closing(loader), closing(loader.steps(0, 1 << 40)) as steps:
            yield from steps

    step = make_bench(config, device).step
    found["step"] = batch * clock(itertools.repeat(resident_batch(config, device)), step, seconds, device)[0]
    cpu, *dali = found["executors"]
    for executor in [cpu, *sorted(dali, key=lambda e: -e["alone"])[:FASTEST]]:
        executor["loader"] = batch * clock(batches(executor), lambda made: None, seconds, device)[0]
        rate, executor["waits"] = clock(batches(executor), step, seconds, device)
        executor["with step"] = batch * rate
        console.print(str(executor))
    return found


# ---- telling --------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows of COLUMNS, and lines about them."""

    def cell(executor: dict[str, Any], what: str, form: str) -> str:
        return format(executor[what], form) if executor.get(what) is not None else ""

    forms = ("", "", ".2f", ",.0f", ",.0f", ",.0f", ".1%")
    rows = [
        [cell(e, what, form) for what, form in zip(COLUMNS, forms, strict=True)] for e in found["executors"]
    ]
    best = max(found["executors"], key=lambda executor: executor.get("with step", 0))
    return rows, [
        f"DALI's slices on the device: {found['slices']}.",
        f"The step alone does {found['step']:,.0f} img/s, with the best loader ({best['decoder']}, {best['threads']} "
        f"threads) {best['with step'] / found['step']:.1%} of that, and {best['waits']:.1%} of that time is waiting.",
    ]


def write(found: dict[str, Any], rows: list[list[str]], lines: list[str]) -> None:
    path = RESULTS / f"{found['date']}-gpu"
    text = [
        f"# {found['device']}, {found['date']}",
        "",
        f"`{found['command']}`: {found['recipe']}, batch {found['batch']}, {found['samples']} samples of "
        f"{found['mean_sample_bytes']:,} bytes; {found['cpu']}, {found['cores']} cores; {found['versions']}",
        "",
        "Images a second, and the share of time that the step waits:",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "--:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *lines,
    ]
    RESULTS.mkdir(exist_ok=True)
    path.with_suffix(".md").write_text("\n".join(text) + "\n")
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written: {path}.md and .json")


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


@click.command()
@click.option("--images", help="A folder of JPEGs; without it, and without --data, drawn scenes.")
@click.option("--data", help="A dataset.")
@click.option(
    "--samples", default=16384, show_default=True, help="Of the dataset that is made, with repeats."
)
@click.option("--recipe", default="recipes/pretrain_vit_base.yaml", show_default=True)
@click.option("--batch", default=256, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="Of each measurement.")
def main(images: str | None, data: str | None, samples: int, recipe: str, batch: int, seconds: float) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        console.print("no GPU: this is the CPU, and no result is kept")
    config = load_config(PretrainConfig, recipe, (f"global_batch={batch}",))
    with tempfile.TemporaryDirectory(prefix="maestream-bench-") as folder:
        dataset = open_dataset(data) if data else build_repeated(images, samples, Path(folder))
        found = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
            "recipe": recipe,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "cpu": cpu_model(),
            "cores": available_cores(),
            "versions": versions(),
            "samples": dataset.samples,
            "mean_sample_bytes": round(dataset.mean_sample_bytes),
            **measure(dataset, config, device, seconds),
        }
    rows, lines = report(found)
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    console.print(table, *lines, sep="\n")
    if device.type == "cuda":
        write(found, rows, lines)


if __name__ == "__main__":
    main()
