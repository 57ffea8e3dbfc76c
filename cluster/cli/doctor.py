"""`maestream doctor`: check a machine before a run, and say how to fix what it finds."""

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

from cluster.terminal.console import console
from pipeline.errors import UserError
from pipeline.text import plural

SNAPSHOTS_GB = 4.0  # of /dev/shm, for a ViT-B: docs/guides/elastic.md says what for
DISK_GB = 10.0  # Ray's sessions and spilled objects, compiled code, indexes
TEST_DATA = bytes(range(256)) * 1024
GB = 1e9


class Finding(NamedTuple):
    """The result of one check."""

    state: str  # "ok", "note" (something optional is missing) or "bad"
    text: str
    fix: str = ""  # what to do about it


MARKS = {"ok": ("✓", "green"), "note": ("·", "yellow"), "bad": ("✗", "red")}


@click.command()
@click.option(
    "--store", metavar="FOLDER", help="Folder or s3://bucket/folder in which to test reading and writing."
)
@click.option(
    "--address", envvar="RAY_ADDRESS", show_envvar=True, metavar="HOST:PORT", help="Ray cluster to check."
)
def doctor(store: str | None, address: str | None) -> None:
    """Check that this machine can run maestream.

    Checks packages, GPU, decoders, storage, Ray, shared memory and disk space, and prints how to fix each problem. Exits with
    code 1 if there are problems.
    """
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
            console.print(f"{mark} {name}: {finding.text}", style=style if finding.state != "ok" else None)
            if finding.fix:
                console.print(f"    → {finding.fix}")
            bad += finding.state == "bad"
    if bad:
        console.print(f"{plural(bad, 'problem')} to fix")
        sys.exit(1)


def packages() -> Iterator[Finding]:
    from pipeline.cpus import available_cores

    versions = {name: version(name) for name in ("maestream", "torch", "ray", "webdataset", "s3fs")}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    yield Finding("ok", f"{listed}; Python {sys.version.split()[0]}, {plural(available_cores(), 'core')}")


def gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            yield Finding(
                "ok",
                f"{device.name}, {device.total_memory / GB:.0f} GB, {_driver()}, CUDA {torch.version.cuda}",
            )
    elif driver := _driver():
        yield Finding(
            "bad",
            f"this machine has a GPU ({driver}), but torch {torch.__version__} cannot use it",
            "install a torch build for the driver's CUDA version; start containers with --gpus all",
        )
    else:
        yield Finding("note", "none, training will run on the CPU")


def _driver() -> str:
    """Return "driver" and its version, or an empty string without an NVIDIA driver."""
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
            "jpeg_crop is not built: Pillow decodes JPEGs instead, at two thirds of the speed",
            "install a C compiler and libjpeg-turbo's headers (Debian: gcc libc6-dev libjpeg-dev), then `pip install -e .`",
        )
    else:
        yield Finding("ok", "jpeg_crop with libjpeg-turbo")
    try:
        yield Finding("ok", f"pillow-simd {version('pillow-simd')}")
    except PackageNotFoundError:
        yield Finding(
            "note",
            f"Pillow {version('pillow')}: pillow-simd is faster for images that jpeg_crop does not decode",
            "pip install --no-binary pillow-simd pillow-simd (Debian: libjpeg-dev zlib1g-dev)",
        )


def dali() -> Iterator[Finding]:
    """Compare the crops of DALI with those of the CPU decoder, on drawn images."""
    import torch

    from pipeline.decode.gpu_check import gpu_crop_mismatch
    from trainer.config.device import best_device

    try:
        import nvidia.dali
    except ImportError:
        yield Finding(
            "note", "not installed: images are decoded on the CPU", "DALI exists for Linux x86_64 only"
        )
        return
    for device in dict.fromkeys((torch.device("cpu"), best_device())):
        problem = gpu_crop_mismatch(device)
        where = f"{nvidia.dali.__version__} on {device}"
        if problem:
            yield Finding(
                "bad",
                f"{where}: {problem}",
                "set data.decoder=cpu, or install DALI 2.2.0, which has nvImageCodec 0.8",
            )
        else:
            yield Finding("ok", f"{where}: same crops as the CPU decoder")


def storage(url: str | None) -> Iterator[Finding]:
    from pipeline.storage.store import open_store

    if not url:
        yield Finding("note", "not checked: pass --store s3://bucket/folder")
        return
    name = f".maestream-doctor-{uuid.uuid4().hex}"
    action, fix = "open", ""
    try:
        store = open_store(url)
        action, fix = "write to", "the key needs permission to put objects; a local folder has to be writable"
        store.write(name, TEST_DATA)
        try:
            action, fix = "read from", "the key needs permission to get objects"
            if store.read(name) != TEST_DATA:
                raise OSError("the bytes read are not those written")
            action, fix = "read byte ranges from", "the server has to support range requests (HTTP 206)"
            if store.read_range(name, 1000, 5000) != TEST_DATA[1000:6000]:
                raise OSError("the bytes read are not those written")
        except (UserError, OSError):
            with suppress(UserError, OSError):  # the first error is the one to report
                store.remove([name])
            raise
        action, fix = "delete from", "the key needs permission to delete objects"
        store.remove([name])
    except (UserError, OSError) as error:
        yield Finding("bad", f"cannot {action} {url}: {error}", fix)
    else:
        yield Finding("ok", f"{url}: writing, reading, reading byte ranges and deleting work")


def ray_cluster(address: str | None) -> Iterator[Finding]:
    import ray

    from cluster.runtime.session import check_reachable

    versions = f"Ray {ray.__version__}, Python {sys.version.split()[0]}"
    if not address:
        yield Finding("ok", f"{versions}; no cluster address given, so commands start Ray on this machine")
        return
    try:
        check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except UserError as error:
        yield Finding("bad", str(error), "start the cluster, or unset RAY_ADDRESS")
        return
    except Exception as error:  # Ray raises many types here, such as RuntimeError if versions differ
        yield Finding(
            "bad", f"{address}: {str(error).strip().splitlines()[0]}", f"the cluster has to run {versions}"
        )
        return
    resources = ray.cluster_resources()
    ray.shutdown()
    yield Finding(
        "ok",
        f"{address}: {versions}; the cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs",
    )


def shared_memory() -> Iterator[Finding]:
    yield check_free_space(
        "/dev/shm",
        SNAPSHOTS_GB,
        "snapshots of a ViT-B",
        "start containers with docker run --shm-size=8g, or turn snapshots off with checkpoint.snapshots=null",
    )


def disk() -> Iterator[Finding]:
    for folder in dict.fromkeys((os.environ.get("RAY_TMPDIR", "/tmp"), os.getcwd())):
        yield check_free_space(
            folder,
            DISK_GB,
            "Ray and the files of a run",
            "free some space, or set RAY_TMPDIR to a folder on another disk",
        )


def check_free_space(folder: str, needed_gb: float, purpose: str, fix: str) -> Finding:
    try:
        free = shutil.disk_usage(folder).free / GB
    except OSError as error:
        return Finding("note", f"{folder}: {error.strerror}", fix)
    if free < needed_gb:
        return Finding("bad", f"{folder} has {free:.1f} GB free, but {purpose} need {needed_gb:g} GB", fix)
    return Finding("ok", f"{folder} has {free:.0f} GB free")
