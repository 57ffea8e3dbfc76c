"""Compare our loader with DALI's file reader on the same files: images per second, and the cores that they keep busy.

    python -m benchmarks.readers --images DIR       # a folder of JPEGs, with repeats; 2 minutes

Both make random 224-pixel crops (the distribution of RandomResizedCrop), half of them flipped, as uint8 tensors on the
GPU if there is one, with the same number of decoding threads. They are measured in turn. DALI's reader shuffles in a
buffer, draws its own crops and does not check the bytes, as in its documentation (docs.nvidia.com/deeplearning/dali,
"fn.readers.file").
"""

import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.datasets import build_from, make_order, write_repeated
from benchmarks.output import save_result
from pipeline.cpus import available_cores
from pipeline.dataset.dataset import Dataset
from pipeline.decode.factory import make_decoder
from pipeline.loading.benchmark import cpu_model
from pipeline.loading.loader import Loader

SIZE, ROUNDS, WARM_UP = 224, 3, 8
console = Console(highlight=False, soft_wrap=True)


def ours(dataset: Dataset, batch: int, threads: int, device: torch.device) -> Iterator[torch.Tensor]:
    loader = Loader(dataset, make_order(dataset, batch), make_decoder("auto", SIZE, threads, device), 0, 1)
    with closing(loader), closing(loader.steps(0, 1 << 40)) as steps:
        for made in steps:
            yield made.images.to(device, non_blocking=True)


def dali(files: Path, batch: int, threads: int, device: torch.device) -> Iterator[torch.Tensor]:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    on_gpu = device.type == "cuda"

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=device.index if on_gpu else None, seed=0)
    def graph() -> object:
        encoded, _ = fn.readers.file(file_root=str(files), random_shuffle=True, initial_fill=1024)
        images = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if on_gpu else "cpu",
            random_area=[0.2, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    for made in DALIGenericIterator(graph(), ["images"]):
        yield made[0]["images"].permute(0, 3, 1, 2).contiguous()


def cpu_s() -> float:
    """CPU seconds used so far by this process and its descendants."""
    here = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in (here, *here.children(recursive=True)))


def rate(batches: Iterator[torch.Tensor], seconds: float, device: torch.device) -> dict[str, float]:
    """Images per second, and the mean number of busy cores."""
    for _ in range(WARM_UP):
        next(batches)
    begin, used, images = time.perf_counter(), cpu_s(), 0
    while time.perf_counter() - begin < seconds:
        images += len(next(batches))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - begin
    return {"img_per_s": images / took, "cores": (cpu_s() - used) / took}


def measure(
    files: Path, dataset: Dataset, batch: int, threads: int, seconds: float, device: torch.device
) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {"maestream": [], "DALI's file reader": []}
    for _ in track(range(ROUNDS), "rounds", console=console):
        for name, make in (
            ("maestream", lambda: ours(dataset, batch, threads, device)),
            ("DALI's file reader", lambda: dali(files, batch, threads, device)),
        ):
            with closing(make()) as batches:
                found[name].append(rate(batches, seconds, device))
    ratios = [
        a["img_per_s"] / b["img_per_s"]
        for a, b in zip(found["maestream"], found["DALI's file reader"], strict=True)
    ]
    return {"rounds": found, "faster_by": statistics.median(ratios), "ratios": ratios}


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--images", help="Folder of JPEGs. Without it, synthetic scenes.")
@click.option("--samples", default=8192, show_default=True, help="Number of files, with repeats.")
@click.option("--batch", default=256, show_default=True, help="Images in a batch.")
@click.option(
    "--threads", type=int, default=available_cores, show_default="CPU count", help="Decoder threads."
)
@click.option("--seconds", default=8.0, show_default=True, help="Duration of each measurement.")
def main(images: str | None, samples: int, batch: int, threads: int, seconds: float) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="maestream-bench-") as folder:
        files = write_repeated(images, samples, Path(folder))
        dataset = build_from(files, Path(folder))
        found = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python -m benchmarks.readers", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
            "cores": available_cores(),
            "threads": threads,
            **measure(files, dataset, batch, threads, seconds, device),
        }
    table = Table("", "img/s", "cores")
    for name, rounds in found["rounds"].items():
        table.add_row(
            name, *(f"{statistics.median(r[what] for r in rounds):,.1f}" for what in ("img_per_s", "cores"))
        )
    console.print(table, f"maestream is {found['faster_by']:.2f} times as fast", sep="\n")
    console.print(save_result(f"{found['date']}-readers-{device.type}", found))


if __name__ == "__main__":
    main()
