"""`maestream doctor`: whether a machine can do what a run will ask of it, and what to do where it cannot."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import click

from cluster.terminal import console
from pipeline.errors import UserError

SNAPSHOTS = (
    4.0  # GB of /dev/shm: twice a ViT-B's weights and AdamW's moments, and its first worker's own (README)
)
DISK = 10.0  # GB: Ray's sessions and spilled objects, compiled code, indexes
PROBE = bytes(range(256)) * 1024  # is written, read and read in part
GB = 1e9


class Finding(NamedTuple):
    state: str  # "ok", "note": it works without, "bad"
    says: str
    mend: str = ""


MARKS = {"ok": ("✓", "green"), "note": ("·", "yellow"), "bad": ("✗", "red")}


@click.command()
@click.option("--store", help="A folder of a bucket that is read and written: s3://bucket/folder.")
@click.option("--address", envvar="RAY_ADDRESS", help="Of a Ray cluster, host:port.")
def doctor(store: str | None, address: str | None) -> None:
    """Look at this machine: packages, GPU, decoders, storage, Ray, memory and disk. Exit code 1 where something has to be
    mended."""
    bad = 0
    for name, check in (
        ("packages", packages),
        ("GPU", gpu),
        ("decoding on the CPU", cpu_decoding),
        ("DALI", dali),
        ("storage", lambda: storage(store)),
        ("Ray", lambda: ray_cluster(address)),
        ("shared memory", shared_memory),
        ("disk", disk),
    ):
        for finding in check():
            mark, style = MARKS[finding.state]
            console.print(f"{mark} {name}: {finding.says}", style=style if finding.state != "ok" else None)
            if finding.mend:
                console.print(f"    → {finding.mend}")
            bad += finding.state == "bad"
    if bad:
        console.print(f"{bad} to be mended")
        sys.exit(1)


def packages() -> Iterator[Finding]:
    from pipeline.cores import available_cores

    found = {name: version(name) for name in ("maestream", "torch", "ray", "webdataset", "s3fs")}
    told = ", ".join(f"{name} {number}" for name, number in found.items())
    yield Finding("ok", f"{told}; Python {sys.version.split()[0]}, {available_cores()} cores")


def gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            there = torch.cuda.get_device_properties(i)
            yield Finding(
                "ok",
                f"{there.name}, {there.total_memory / GB:.0f} GB, {_driver()}, CUDA {torch.version.cuda}",
            )
    elif driver := _driver():
        yield Finding(
            "bad",
            f"the machine has one ({driver}), torch {torch.__version__} does not see it",
            "install a build of torch for its CUDA, and run containers with --gpus all",
        )
    else:
        yield Finding("note", "none, so training is on the CPU")


def _driver() -> str:
    """What NVIDIA's driver calls itself; empty if there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"driver {done.stdout.split()[0]}" if done.stdout.strip() else ""


def cpu_decoding() -> Iterator[Finding]:
    from pipeline.decode.cpu import jpeg_crop

    if jpeg_crop is None:
        yield Finding(
            "note",
            "jpeg_crop is not built, so Pillow decodes JPEGs, at two thirds of the speed",
            "install a C compiler and libjpeg-turbo's headers (Debian: gcc libc6-dev libjpeg-dev), then `pip install -e .`",
        )
    else:
        yield Finding("ok", "jpeg_crop, by libjpeg-turbo")
    try:
        yield Finding("ok", f"pillow-simd {version('pillow-simd')}")
    except PackageNotFoundError:
        yield Finding(
            "note",
            f"Pillow {version('pillow')}, which is slower than pillow-simd at what jpeg_crop does not do",
            "pip install --no-binary pillow-simd pillow-simd (Debian: libjpeg-dev zlib1g-dev)",
        )


def dali() -> Iterator[Finding]:
    """Pictures that are drawn here, through DALI, are what they are through `cpu`."""
    import torch

    from pipeline.decode.check import slices_differ_on
    from trainer.device import best_device

    try:
        import nvidia.dali
    except ImportError:
        yield Finding("note", "not installed, so the CPU decodes", "it exists for linux x86_64 alone")
        return
    for device in dict.fromkeys((torch.device("cpu"), best_device())):
        problem = slices_differ_on(device)
        where = f"{nvidia.dali.__version__} on {device}"
        if problem:
            yield Finding(
                "bad", f"{where}: {problem}", "data.decoder=cpu does without; DALI 2.2.0 has nvImageCodec 0.8"
            )
        else:
            yield Finding("ok", f"{where}: its crops are the CPU's")


def storage(url: str | None) -> Iterator[Finding]:
    from pipeline.storage import open_store

    if not url:
        yield Finding("note", "not looked at: --store s3://bucket/folder")
        return
    name = f".maestream-doctor-{uuid.uuid4().hex}"
    what, mend = "opened", ""
    try:
        store = open_store(url)
        what, mend = "written", "the key needs the right to put objects; or the folder has to be there"
        store.write(name, PROBE)
        try:
            what, mend = "read", "the key needs the right to get objects"
            if store.read(name) != PROBE:
                raise OSError("other bytes came back than were written")
            what, mend = "read in part", "the server has to answer ranges (206)"
            if store.read_range(name, 1000, 5000) != PROBE[1000:6000]:
                raise OSError("other bytes came back than were written")
        except (UserError, OSError):
            with suppress(UserError, OSError):  # the first reason is the one to mend
                store.remove([name])
            raise
        what, mend = "removed", "the key needs the right to delete objects"
        store.remove([name])
    except (UserError, OSError) as error:
        yield Finding("bad", f"{url} cannot be {what}: {error}", mend)
    else:
        yield Finding("ok", f"{url}: written, read, read in part, removed")


def ray_cluster(address: str | None) -> Iterator[Finding]:
    import ray

    from cluster.connect import check_reachable

    ours = f"Ray {ray.__version__}, Python {sys.version.split()[0]}"
    if not address:
        yield Finding("ok", f"{ours}; no cluster, so commands start one in this machine")
        return
    try:
        check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except UserError as error:
        yield Finding("bad", str(error), "start it, or unset RAY_ADDRESS")
        return
    except Exception as error:  # Ray raises what it likes here: versions that differ are a RuntimeError
        yield Finding("bad", f"{address}: {str(error).strip().splitlines()[0]}", f"the cluster needs {ours}")
        return
    there = ray.cluster_resources()
    ray.shutdown()
    yield Finding(
        "ok", f"{address}: {ours}, {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs in it"
    )


def shared_memory() -> Iterator[Finding]:
    yield room(
        "/dev/shm",
        SNAPSHOTS,
        "snapshots of a ViT-B",
        "docker run --shm-size=8g, or checkpoint.snapshots=null does without",
    )


def disk() -> Iterator[Finding]:
    for folder in dict.fromkeys((os.environ.get("RAY_TMPDIR", "/tmp"), os.getcwd())):
        yield room(
            folder, DISK, "Ray and what a run writes", "make room, or set RAY_TMPDIR to a folder elsewhere"
        )


def room(folder: str, needed: float, whose: str, mend: str) -> Finding:
    try:
        free = shutil.disk_usage(folder).free / GB
    except OSError as error:
        return Finding("note", f"{folder}: {error.strerror}", mend)
    if free < needed:
        return Finding("bad", f"{folder} has {free:.1f} GB free, and {whose} need {needed:g}", mend)
    return Finding("ok", f"{folder} has {free:.0f} GB free")
