"""Measure decoders, the loader, the training step, and loader and step together, in images per second.

    python -m benchmarks.gpu --images DIR       # builds a dataset of --samples from a folder of JPEGs, with repeats
    python -m benchmarks.gpu --data DATASET     # an existing dataset; webdataset and Ray need not be installed

1. Check: compare DALI's crops on the GPU with the CPU's (pipeline.decode.gpu_check). If they differ, DALI is skipped.
2. Decoder alone: samples in memory, as many batches at the same time as in the loader. `cpu`, and DALI with several
   numbers of host threads and shares of the GPU's JPEG engines (HW_DECODER_LOAD).
3. Step alone: a training step of the recipe's model on images that are on the device already.
4. Loader alone: with `cpu` and with the fastest DALI settings.
5. Step and loader together, with the same decoders, because a GPU that trains decodes more slowly. "waits" is the share
   of time that the trainer waits for a batch. Work is still queued on the device then, so the device idles for less;
   compare the rate with 3 to see what the loader costs.

Results are only saved for a GPU. Without one, everything is measured on the CPU; it takes a minute with

    python -m benchmarks.gpu --recipe recipes/pretrain_vit_tiny.yaml --batch 16 --samples 512 --seconds 2
"""

import datetime
import itertools
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
from benchmarks.output import save_result
from pipeline.cpus import available_cores
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.cpu import CpuDecoder
from pipeline.decode.decoder import Decoder, Size
from pipeline.decode.gpu_check import gpu_crop_mismatch
from pipeline.loading.benchmark import cpu_model
from pipeline.loading.crops import random_flips, random_resized_crops
from pipeline.loading.loader import CONCURRENT_DECODES, Loader, TrainBatch
from pipeline.loading.readahead import Samples, read_samples
from trainer.config.recipe import load_config
from trainer.config.schema import PretrainConfig
from trainer.train.benchmark import make_bench, resident_batch

WARM_UP = 8  # batches before each measurement, in which pipelines and buffers are made
IN_MEMORY = 2048  # samples in memory, to measure decoders alone
FASTEST = 3  # DALI settings that are measured with loader and step
HW_DECODER_LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
PACKAGES = (
    "torch",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "nvidia-nvimgcodec-cu12",
    "nvidia-nvimgcodec-cu13",
)
COLUMNS = (
    "decoder",
    "threads",
    "hw_decoder_load",
    "alone",
    "loader",
    "with step",
    "waits",
)  # keys of a decoder's row
console = Console(highlight=False, soft_wrap=True)


# ---- measuring ------------------------------------------------------------------------------------------------


def clock(
    batches: Iterable[Any], act: Callable[[Any], object], seconds: float, device: torch.device
) -> tuple[float, float]:
    """Call `act` on batches for some seconds after the warm-up.

    Returns batches per second, and the share of the time that the batches were waited for.
    """

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


def decoder_rate(decoder: Decoder, samples: Samples, batch: int, seconds: float) -> float:
    """Images per second of a decoder alone."""
    located = samples.located
    boxes = random_resized_crops(0, 0, samples.ids, located.height, located.width)
    flips = random_flips(0, 0, samples.ids)

    def decode(turn: int) -> None:
        chosen = np.arange(turn * batch, (turn + 1) * batch) % len(samples.ids)
        decoded = decoder([samples.encoded[i] for i in chosen], boxes[chosen], flips[chosen])
        assert not decoded.bad, decoded.bad

    with ThreadPoolExecutor(CONCURRENT_DECODES) as pool:
        turns = itertools.count()
        for _ in pool.map(decode, itertools.islice(turns, 2 * CONCURRENT_DECODES)):
            pass
        begin, done = time.perf_counter(), 0
        under_way = deque(pool.submit(decode, next(turns)) for _ in range(CONCURRENT_DECODES))
        while time.perf_counter() - begin < seconds:
            under_way.popleft().result()
            under_way.append(pool.submit(decode, next(turns)))
            done += 1
        return done * batch / (time.perf_counter() - begin)


# ---- what is measured -----------------------------------------------------------------------------------------


def decoder_settings(device: torch.device, dali: bool) -> list[dict[str, Any]]:
    """The decoders to measure, `cpu` first."""
    cores = available_cores()
    found: list[dict[str, Any]] = [{"decoder": "cpu", "threads": cores, "hw_decoder_load": None}]
    if dali:
        loads = HW_DECODER_LOADS if device.type == "cuda" else (0.0,)
        tried = sorted({max(1, cores // 4), max(1, cores // 2), cores})
        found += [{"decoder": "dali", "threads": t, "hw_decoder_load": s} for t in tried for s in loads]
    return found


def make_decoder(settings: dict[str, Any], size: Size, device: torch.device) -> Decoder:
    if settings["decoder"] == "cpu":
        return CpuDecoder(size, settings["threads"])
    from pipeline.decode import dali

    dali.HW_DECODER_LOAD = settings["hw_decoder_load"]
    return dali.DaliDecoder(size, settings["threads"], device)


def measure(dataset: Dataset, config: PretrainConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    batch, size = config.global_batch, config.model.size
    found: dict[str, Any] = {"batch": batch}
    try:
        import nvidia.dali  # noqa: F401

        found["gpu_check"] = gpu_crop_mismatch(device) or "passed"
    except ImportError:
        found["gpu_check"] = "DALI is not installed"
    console.print(f"check of DALI's crops on {device}: {found['gpu_check']}")

    samples = read_samples(dataset, np.arange(min(dataset.samples, IN_MEMORY)))
    found["decoders"] = decoder_settings(device, found["gpu_check"] == "passed")
    for settings in found["decoders"]:
        with closing(make_decoder(settings, size, device)) as decoder:
            settings["alone"] = decoder_rate(decoder, samples, batch, seconds)
        console.print(str(settings))

    def batches(settings: dict[str, Any]) -> Iterable[TrainBatch]:
        loader = Loader(dataset, make_order(dataset, batch), make_decoder(settings, size, device), 0, 1)
        with closing(loader), closing(loader.steps(0, 1 << 40)) as steps:
            yield from steps

    step = make_bench(config, device).step
    found["step"] = batch * clock(itertools.repeat(resident_batch(config, device)), step, seconds, device)[0]
    cpu, *dali = found["decoders"]
    for settings in [cpu, *sorted(dali, key=lambda e: -e["alone"])[:FASTEST]]:
        settings["loader"] = batch * clock(batches(settings), lambda made: None, seconds, device)[0]
        rate, settings["waits"] = clock(batches(settings), step, seconds, device)
        settings["with step"] = batch * rate
        console.print(str(settings))
    return found


# ---- the report --------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """The table, with COLUMNS, and a summary."""

    def cell(settings: dict[str, Any], what: str, form: str) -> str:
        return format(settings[what], form) if settings.get(what) is not None else ""

    forms = ("", "", ".2f", ",.0f", ",.0f", ",.0f", ".1%")
    rows = [
        [cell(e, what, form) for what, form in zip(COLUMNS, forms, strict=True)] for e in found["decoders"]
    ]
    best = max(found["decoders"], key=lambda settings: settings.get("with step", 0))
    return rows, [
        f"Check of DALI's crops on the device: {found['gpu_check']}.",
        f"The step alone does {found['step']:,.0f} img/s. With the best loader ({best['decoder']}, {best['threads']} "
        f"threads) it does {best['with step'] / found['step']:.1%} of that, and waits {best['waits']:.1%} of the time.",
    ]


def save(found: dict[str, Any], rows: list[list[str]], lines: list[str]) -> None:
    text = [
        f"# {found['device']}, {found['date']}",
        "",
        f"`{found['command']}`: {found['recipe']}, batch {found['batch']}, {found['samples']} samples of "
        f"{found['mean_sample_bytes']:,} bytes; {found['cpu']}, {found['cores']} cores; {found['versions']}",
        "",
        "Images per second, and the share of time that the step waits for a batch:",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "--:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *lines,
    ]
    console.print(save_result(f"{found['date']}-gpu", found, "\n".join(text) + "\n"))


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option(
    "--images", help="Folder of JPEGs to build a dataset from. Without it and --data, synthetic scenes."
)
@click.option("--data", help="An existing dataset.")
@click.option(
    "--samples", default=16384, show_default=True, help="Size of the dataset that is built, with repeats."
)
@click.option("--recipe", default="recipes/pretrain_vit_base.yaml", show_default=True, help="Model to train.")
@click.option("--batch", default=256, show_default=True, help="Images in a batch.")
@click.option("--seconds", default=5.0, show_default=True, help="Duration of each measurement.")
def main(images: str | None, data: str | None, samples: int, recipe: str, batch: int, seconds: float) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        console.print("no GPU: measuring on the CPU, results are not saved")
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
        save(found, rows, lines)


if __name__ == "__main__":
    main()
