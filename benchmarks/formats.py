"""Compare the loader's speed on the same photographs in each format.

    python -m benchmarks.formats --images DIR       # a folder of JPEGs; 5 minutes

The photographs are decoded and written again in each format, in the layout of img2dataset (00000.tar with 000000000.webp,
.json and .txt), and indexed. Then the loader makes random 224-pixel crops of each, in turn, with the same threads. Rates are
images per second of CPU time, so other programs on the machine matter little.
"""

import datetime
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import imagecodecs
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.datasets import make_order, read_images
from benchmarks.output import save_result
from pipeline.cpus import available_cores
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.index import find_shards, index_shards
from pipeline.decode.factory import make_decoder
from pipeline.images.formats import read_pixels
from pipeline.images.tiff import write_tiff
from pipeline.loading.benchmark import cpu_model
from pipeline.loading.loader import Loader
from pipeline.storage.store import open_store

SIZE, WARM_UP = 224, 4
Pixels = npt.NDArray[np.uint8]
console = Console(highlight=False, soft_wrap=True)
# Extension → encoder; lossy ones at about the quality of JPEG 90.
ENCODERS: dict[str, Callable[[Pixels], bytes]] = {
    "jpg": lambda pixels: imagecodecs.jpeg8_encode(pixels, level=90),
    "webp": lambda pixels: imagecodecs.webp_encode(pixels, level=85, lossless=False),
    "avif": lambda pixels: imagecodecs.avif_encode(pixels, level=80, speed=9),
    "jxl": lambda pixels: imagecodecs.jpegxl_encode(pixels, distance=1.0, effort=3),
    "jp2": lambda pixels: imagecodecs.jpeg2k_encode(pixels, level=40),
    "png": lambda pixels: imagecodecs.png_encode(pixels),
    "tif": lambda pixels: write_tiff(pixels, 8),
    "bmp": lambda pixels: imagecodecs.bmp_encode(pixels),
}


def as_img2dataset(images: list[bytes], extension: str, folder: Path) -> Dataset:
    """Write one tar of these images, and index it."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i, data in enumerate(images):
            caption = f"photograph {i}"
            description = json.dumps({"caption": caption, "key": f"{i:09d}", "status": "success"})
            for name, content in (
                (extension, data),
                ("json", description.encode()),
                ("txt", caption.encode()),
            ):
                member = tarfile.TarInfo(f"{i:09d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    store = open_store(str(folder))
    index_shards(store, find_shards(store), store, checksums=True)
    return open_dataset(str(folder))


def rate(dataset: Dataset, batch: int, threads: int, seconds: float) -> float:
    """Images per second of the loader's CPU time. RuntimeError if there is a bad sample."""
    loader = Loader(dataset, make_order(dataset, batch), make_decoder("cpu", SIZE, threads), 0, 1)
    with closing(loader), closing(loader.steps(0, 1 << 40)) as steps:
        for _ in range(WARM_UP):
            next(steps)
        begin, used, images = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < seconds:
            made = next(steps)
            images += len(made.images)
            if made.bad:
                raise RuntimeError(f"bad samples: {made.bad}")
        return images / (time.process_time() - used)


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--images", help="Folder of JPEGs. Without it, synthetic scenes.")
@click.option("--samples", default=200, show_default=True, help="Number of images, at most.")
@click.option("--batch", default=32, show_default=True, help="Images in a batch.")
@click.option(
    "--threads", type=int, default=available_cores, show_default="CPU count", help="Decoder threads."
)
@click.option("--seconds", default=4.0, show_default=True, help="Duration of each measurement.")
@click.option("--rounds", default=3, show_default=True, help="Number of measurements of each format.")
def main(images: str | None, samples: int, batch: int, threads: int, seconds: float, rounds: int) -> None:
    photographs = [read_pixels(data) for data in read_images(images)[:samples]]
    photographs = [pixels for pixels in photographs if pixels.shape[2] == 3]
    rates: dict[str, list[float]] = {extension: [] for extension in ENCODERS}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="maestream-bench-") as folder:
        datasets = {}
        for extension, encode in track(ENCODERS.items(), "writing", console=console):
            encoded = [encode(pixels) for pixels in photographs]
            sizes[extension] = sum(map(len, encoded)) / len(encoded)
            datasets[extension] = as_img2dataset(encoded, extension, Path(folder) / extension)
        for _ in track(range(rounds), "rounds", console=console):
            for extension, dataset in datasets.items():
                rates[extension].append(rate(dataset, batch, threads, seconds))
    relative = {
        extension: statistics.median(a / b for a, b in zip(found, rates["jpg"], strict=True))
        for extension, found in rates.items()
    }
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.formats", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "threads": threads,
        "samples": len(photographs),
        "img_per_cpu_s": rates,
        "compared_with_jpeg": relative,
        "mean_bytes": sizes,
    }
    table = Table("format", "img/s of CPU time", "compared with JPEG", "kB per image")
    for extension, found in rates.items():
        row = (
            f"{statistics.median(found):,.0f}",
            f"{relative[extension]:.2f} ×",
            f"{sizes[extension] / 1e3:,.0f}",
        )
        table.add_row(extension, *row)
    console.print(table)
    console.print(save_result(f"{result['date']}-formats", result))


if __name__ == "__main__":
    main()
