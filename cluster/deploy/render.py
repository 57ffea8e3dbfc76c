"""Render cluster manifests from the config of a run, so that the two always agree.

The output is a template of cluster/deploy/templates/ with its `${values}` filled in, without the lines that end with
`# only with NAME` if the value NAME is None.
"""

import hashlib
import math
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import torch

from cluster.deploy.paths import paths_in
from pipeline.errors import UserError
from pipeline.secrets import has_secret
from trainer.config.device import weight_dtype
from trainer.config.recipe import dump_config
from trainer.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from trainer.models.classifier import Encoder
from trainer.models.mae import MAE

TEMPLATES = Path(__file__).parent / "templates"
CONFIG_FOLDER = "/tmp/maestream"  # on the head node; the config is written to config.yaml in it
SHARED_MEMORY = "/dev/shm"
GIB = 2**30
# How long Ray drains the node of a pod that gets SIGTERM (Ray's default: 30 s), and how long Kubernetes waits before it
# kills the pod. EC2 announces the end of a spot machine 120 s ahead, and the upload of a large checkpoint takes a while. On
# clouds with a shorter notice (Google: 30 s) the machine simply ends sooner.
DRAIN_S, GRACE_S = 90, 120
OBJECT_STORE_BYTES = GIB  # on a worker machine; only short messages go through it, tensors go over NCCL
# Per worker: NCCL's buffers in /dev/shm, and a process with torch, CUDA and decoded batches. The latter is a generous guess.
NCCL_BYTES, PROCESS_BYTES = GIB // 2, 8 * GIB
DEFAULT_THREADS = 4  # decoder threads per worker, if the config does not set data.threads
OTHER_CORES = 2  # CPU cores per worker for the training loop and the fetch process


def render_manifest(
    target: str,
    config: RunConfig,
    data: str,
    out: str,
    image: str,
    gpus: int,
    ledger: bool,
    file: str | None,
    extra: dict[str, str | None],
) -> str:
    """Return the YAML that runs a config on a cluster.

    Args:
        target: name of the template: kuberay or aws.
        config: of the run.
        data: URL of the dataset.
        out: URL of the run folder.
        image: container image, with its tag.
        gpus: GPUs per machine.
        ledger: whether the run gets `--ledger`.
        file: where the YAML will be saved, for the commands in its header; None: not known.
        extra: further values of the template; None where it goes without.

    Raises:
        UserError: if the run could not work on a cluster, or the YAML would contain a secret.
    """
    _check_paths(config, data, out)
    path = f"{CONFIG_FOLDER}/config.yaml"
    command = ["maestream", config.task, "--config", path, "--data", data, "--out", out]
    entrypoint = shlex.join([*command, "--ledger"] if ledger else command)
    name = cluster_name(out)
    dumped = dump_config(config).rstrip()
    values = {
        **machines(config, gpus),
        **extra,
        "name": name,
        "file": file or f"{name}.yaml",
        "config": (shlex.quote(dumped) if target == "aws" else dumped).replace("\n", "\n    "),
        "entrypoint": entrypoint,
        "image": image,
        "folder": CONFIG_FOLDER,
        "ray_version": version("ray"),
        "drain": DRAIN_S,
        "grace": GRACE_S,
    }
    text = _fill_template((TEMPLATES / f"{target}.yaml").read_text(), values)
    check_no_secrets(text)
    return text


def _fill_template(template: str, values: dict[str, Any]) -> str:
    lines = []
    for line in template.splitlines():
        content, _, needed = line.partition("  # only with ")
        if not needed or values[needed] is not None:
            lines.append(content + "\n")
    return Template("".join(lines)).substitute(values)


def cluster_name(out: str) -> str:
    """Return a name for the cluster that trains the run at `out`, always the same one.

    KubeRay's names have at most 47 characters and start with a letter.
    """
    readable = re.sub(r"[^a-z0-9]+", "-", out.rstrip("/").rpartition("/")[2].lower()).strip("-")
    return f"maestream-{readable[:24]}-{hashlib.sha256(out.rstrip('/').encode()).hexdigest()[:6]}"


def machines(config: RunConfig, gpus: int) -> dict[str, Any]:
    """Return the number of worker machines and their resources, by the names of the templates' values.

    Sizes named *_gb, shm and memory are in GiB, object_store is in bytes.

    Args:
        config: of the run.
        gpus: GPUs per machine; each has one worker.
    """
    workers, state = config.workers, state_bytes(config)
    snapshots = state if config.checkpoint.snapshots else 0
    # Two snapshots: the newest one, and the next one while it is written.
    shm = 2 * snapshots + OBJECT_STORE_BYTES + gpus * NCCL_BYTES
    # The shuffle window is spread over the cluster: a machine's part is largest on the smallest cluster.
    window = config.data.memory_gb * GIB * min(1, gpus / workers.min)
    cache, cache_bytes = config.data.disk_cache or (None, 0)
    return {
        "min_machines": math.ceil(workers.min / gpus),
        "max_machines": math.ceil(workers.max / gpus),
        "gpus": gpus,
        "cpus": gpus * ((config.data.threads or DEFAULT_THREADS) + OTHER_CORES),
        "shm": math.ceil(shm / GIB),
        # Once more `snapshots`: the copy of the state that a snapshot is written from.
        "memory": math.ceil((shm + snapshots + gpus * PROCESS_BYTES + window) / GIB),
        "object_store": OBJECT_STORE_BYTES,
        "cache": cache,
        # 10 % spare: Kubernetes evicts a pod that exceeds its limit.
        "cache_gb": math.ceil(1.1 * cache_bytes / GIB),
    }


def state_bytes(config: RunConfig) -> int:
    """Return the approximate size of a snapshot: the weights and AdamW's two moments (trainer.run.snapshot)."""
    with torch.device("meta"):
        model = MAE(config.model) if isinstance(config, PretrainConfig) else Encoder(config.model)
    copies = 4 if isinstance(config, FinetuneConfig) and config.optim.ema else 3
    return copies * sum(parameter.numel() for parameter in model.parameters()) * weight_dtype(config).itemsize


def _check_paths(config: RunConfig, data: str, out: str) -> None:
    """Raise UserError for paths that do not exist on other machines, and for characters that a shell would interpret."""
    for key, url in ({"--data": data, "--out": out} | paths_in(config.model_dump())).items():
        if "://" not in url or url.startswith(("file:", "local:", "memory:")):
            raise UserError(
                f"{key} {url}: workers on other machines cannot read a local path: use an s3:// URL"
            )
        if shlex.quote(url) != url:
            raise UserError(
                f"{key} {url}: the URL passes through shells, so it may contain only letters, digits and @%+=:,./_-"
            )
    cache, snapshots = config.data.cache, config.checkpoint.snapshots
    if cache and (not cache.startswith("/") or ":" in cache or shlex.quote(cache) != cache):
        raise UserError(f"data.cache {cache}: use an absolute path without spaces and colons")
    if snapshots and Path(SHARED_MEMORY) not in (Path(snapshots), *Path(snapshots).parents):
        raise UserError(
            f"checkpoint.snapshots {snapshots}: use a folder in {SHARED_MEMORY}, the only memory-backed folder of the "
            "cluster's machines"
        )


def check_no_secrets(text: str) -> None:
    """Raise UserError if the text contains a key or a password."""
    if has_secret(text):
        raise UserError(
            "a manifest must not contain keys or passwords: grant access with --service-account, --secret or "
            "--instance-profile"
        )
