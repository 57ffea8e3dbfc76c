"""One loader of `benchmarks.peers`, measured in its own process and Python environment.

    python -m benchmarks.peers.contestant NAME FOLDER BATCH WORKERS

Takes uint8[B, 3, 224, 224] batches with their sample ids, for a warm-up pass over the images and then for a measured
pass, and prints one line of JSON. The warm-up pass also saves some pixels of each image, so that `benchmarks.peers` can
check that all loaders make the same crops. WORKERS is the number of processes or threads, whichever the loader uses.

torchvision cannot be imported with the torch version that this project pins, so the few lines of it that are needed
are written out here.
"""

import functools
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from benchmarks.peers.plan import PASSES, SEED, SIZE, Plan, load_plan

Batches = Iterator[tuple[torch.Tensor, Any]]  # uint8[B, 3, 224, 224]; sample ids [B], or None if unknown

PREFETCH = 4  # batches that each DataLoader worker prepares ahead, so that none waits for its turn
POINTS = slice(16, None, 32)  # rows and columns of the pixels that are saved: 7 × 7 of a crop
PACKAGES = ("torch", "numpy", "pillow", "pillow-simd", "webdataset", "spdl-core", "nvidia-dali-cuda120")


# ---- ours -----------------------------------------------------------------------------------------------------


def ours(plan: Plan, batch: int, workers: int) -> Batches:
    from pipeline.dataset.dataset import open_dataset
    from pipeline.decode.factory import make_decoder
    from pipeline.loading.disk_cache import CHUNK_BYTES
    from pipeline.loading.loader import Loader
    from pipeline.loading.order import Order, default_block, default_lanes

    dataset = open_dataset(str(plan.folder / "shards"))
    lanes = default_lanes(batch)
    # The recipes' memory_gb.
    block = default_block(lanes, dataset.mean_sample_bytes, CHUNK_BYTES, 16 * 2**30)
    order = Order(dataset.shard_samples, seed=SEED, global_batch=batch, lanes=lanes, block=block)
    loader = Loader(dataset, order, make_decoder("auto", SIZE, workers), rank=0, world_size=1)
    for made in loader.steps(0, PASSES * order.steps_per_epoch):
        yield made.images, made.sample_ids


def our_decoder(plan: Plan, batch: int, workers: int) -> Batches:
    """Our decoder on files in memory, without a loader. With one thread it is the upper limit of a core."""
    from pipeline.decode.factory import make_decoder

    encoded = [Path(plan.file(i)).read_bytes() for i in range(plan.samples)]
    decoder = make_decoder("auto", SIZE, workers)
    visits = np.array(plan.visits())
    for at in range(0, len(visits), batch):
        nth, ids = visits[at : at + batch].T
        decoded = decoder([encoded[i] for i in ids], plan.boxes[nth, ids], plan.flips[nth, ids])
        yield decoded.images, ids


# ---- peers ----------------------------------------------------------------------------------------------------


def crop_and_flip(image: Image.Image, box: np.ndarray, flip: bool) -> Image.Image:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip on a PIL image, with a given box and flip."""
    y, x, height, width = box.tolist()
    crop = image.crop((x, y, x + width, y + height)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    """torchvision's PILToTensor: uint8[3, height, width]."""
    return torch.as_tensor(np.array(image, copy=True)).permute(2, 0, 1)


class ImageFolder(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """torchvision's ImageFolder with the transforms above; its index is (pass, sample id)."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getitem__(self, visit: tuple[int, int]) -> tuple[torch.Tensor, int]:
        nth, i = visit
        with open(self.plan.file(i), "rb") as file:  # as pil_loader
            image = Image.open(file).convert("RGB")
        return pil_to_tensor(crop_and_flip(image, self.plan.boxes[nth, i], self.plan.flips[nth, i])), i


def imagefolder(plan: Plan, batch: int, workers: int) -> Batches:
    yield from torch.utils.data.DataLoader(
        ImageFolder(plan),
        batch_size=batch,
        sampler=plan.visits(),
        num_workers=workers,
        prefetch_factor=PREFETCH,
        persistent_workers=True,
    )


def webdataset(plan: Plan, batch: int, workers: int) -> Batches:
    """The webdataset library. Boxes are looked up by key, and every pass uses those of the first, because passes overlap."""
    import webdataset as wds

    id_of = {key: i for i, key in enumerate(plan.keys.tolist())}

    def to_item(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        i = id_of[sample["__key__"]]
        return pil_to_tensor(crop_and_flip(sample["jpg"], plan.boxes[0, i], plan.flips[0, i])), i

    dataset = wds.WebDataset(plan.shards, shardshuffle=len(plan.shards), seed=SEED).shuffle(1000)
    # Let the DataLoader make the batches, directly in shared memory: `.batched()` would copy them once more.
    yield from torch.utils.data.DataLoader(
        dataset.decode("pil").map(to_item).repeat(),
        batch_size=batch,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        persistent_workers=True,
    )


def spdl(plan: Plan, batch: int, workers: int, *, whole_batches: bool) -> Batches:
    """SPDL's documented pipeline: threads of one process, which decode with PIL. A task is an image or a whole batch.
    (SPDL's own decoder needs FFmpeg's libraries.)"""
    from spdl.pipeline import PipelineBuilder

    def load(visit: tuple[int, int]) -> tuple[np.ndarray, int]:
        nth, i = visit
        with open(plan.file(i), "rb") as file:
            image = Image.open(file).convert("RGB")
        return np.asarray(crop_and_flip(image, plan.boxes[nth, i], plan.flips[nth, i])), i

    def collate(items: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, list[int]]:
        images = np.stack([image for image, _ in items])
        return torch.from_numpy(images).permute(0, 3, 1, 2), [i for _, i in items]

    def load_batch(visits: list[tuple[int, int]]) -> tuple[torch.Tensor, list[int]]:
        return collate([load(visit) for visit in visits])

    builder = PipelineBuilder().add_source(plan.visits())
    if whole_batches:
        builder = builder.aggregate(batch).pipe(load_batch, concurrency=workers)
    else:
        builder = builder.pipe(load, concurrency=workers).aggregate(batch).pipe(collate)
    pipeline = builder.add_sink(3).build(num_threads=workers)
    with pipeline.auto_stop():
        yield from pipeline


def dali(plan: Plan, batch: int, workers: int) -> Batches:
    """DALI's webdataset reader. It draws its own boxes, from the same distribution."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(batch_size=batch, num_threads=workers, device_id=None, seed=SEED)
    def graph() -> object:
        indexes = [tar.removesuffix("tar") + "idx" for tar in plan.shards]
        jpegs = fn.readers.webdataset(
            paths=plan.shards, index_paths=indexes, ext=["jpg"], random_shuffle=True, initial_fill=1000
        )
        images = fn.decoders.image_random_crop(
            jpegs,
            random_area=[0.2, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as libjpeg does by default; it has no measurable cost
        )
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    for made in DALIGenericIterator(graph(), ["images"]):
        yield made[0]["images"].permute(0, 3, 1, 2), None


CONTESTANTS = {
    "ours": ours,
    "our decoder": our_decoder,
    "imagefolder": imagefolder,
    "webdataset": webdataset,
    "spdl": functools.partial(spdl, whole_batches=False),
    "spdl batches": functools.partial(spdl, whole_batches=True),
    "dali": dali,
}


# ---- measuring ------------------------------------------------------------------------------------------------


def own_cpu_s() -> float:
    """CPU seconds used so far by this process and its running workers."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user, system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def all_cpu_s() -> float:
    """Seconds that our cores have been busy so far, for any process, including time that the host took from a virtual
    machine (steal)."""
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    # user, nice, system, (idle, iowait,) irq, softirq, steal
    ticks = sum(int(row[i]) for row in rows if row[0] in ours for i in (1, 2, 3, 6, 7, 8))
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(batches: Batches, samples: int, batch: int) -> tuple[dict[str, float], np.ndarray]:
    """Take one pass of batches to warm up, then measure one pass.

    Returns:
        images per second, and the mean number of cores that this loader and other processes kept busy;
        the saved pixels of the warm-up pass: uint8[samples, 3, 7, 7], zeros where none were saved.
    """
    points = np.zeros((samples, 3, 7, 7), np.uint8)
    for step in range(samples // batch):
        images, ids = next(batches)
        # Save none of the last quarter: loaders that return batches out of order mix in some of the next pass.
        if ids is not None and step < samples // batch * 3 // 4:
            points[np.asarray(ids)] = images[:, :, POINTS, POINTS].numpy()
    begin, own, everyone = time.perf_counter(), own_cpu_s(), all_cpu_s()
    for _ in range(samples // batch):
        images, _ = next(batches)
        if images.shape != (batch, 3, SIZE, SIZE) or images.dtype != torch.uint8:
            raise ValueError(f"a batch is {images.dtype}{list(images.shape)}")
    seconds, own, everyone = time.perf_counter() - begin, own_cpu_s() - own, all_cpu_s() - everyone
    rate = samples // batch * batch / seconds
    return {"rate": rate, "cores": own / seconds, "others": (everyone - own) / seconds}, points


def versions() -> dict[str, str]:
    """Versions of the packages that matter here, of those that are installed."""
    found = {"python": sys.version.split()[0], "libjpeg-turbo": features.version("libjpeg_turbo") or "none"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(name: str, folder: str, batch: str, workers: str) -> None:
    warnings.filterwarnings(
        "ignore", message="This DataLoader will create"
    )  # more workers than cores are tried on purpose
    plan = load_plan(Path(folder))
    batches = CONTESTANTS[name](plan, int(batch), int(workers))
    measured, points = measure(batches, plan.samples, int(batch))
    np.save(f"{folder}/points.npy", points)
    print(json.dumps({**measured, "versions": versions()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
