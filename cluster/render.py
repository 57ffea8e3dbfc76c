"""What brings a run to a cluster, rendered from the config that the run itself gets, so that the two cannot drift.

What comes out is in cluster/manifests/, but for ${values}, and for lines that end with `# only with …`.
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

from cluster.places import places_in
from pipeline.errors import UserError
from pipeline.secrets import has_secret
from trainer.classifier import Encoder
from trainer.config import FinetuneConfig, PretrainConfig, RunConfig
from trainer.device import dtype_of
from trainer.mae import MAE
from trainer.recipe import dump_config

TEMPLATES = Path(__file__).parent / "manifests"
FOLDER = "/tmp/maestream"  # on the head: where the config lies
SHARED = "/dev/shm"
GIB = 2**30
# Ray drains a pod's node for 30 s unless told otherwise. A spot machine of EC2 has 120 s, and a large state takes some to
# upload; where a cloud gives less (Google 30 s), it simply ends sooner.
DRAIN_S, GRACE_S = 90, 120
OBJECT_STORE = GIB  # of a machine with workers: they send each other words, tensors go over NCCL
# Of a worker, besides: what NCCL keeps in /dev/shm, and what a process with torch, CUDA and decoded batches takes. The
# second is a guess, and a generous one.
NCCL, PROCESS = GIB // 2, 8 * GIB
THREADS, OTHER_CORES = 4, 2  # decoding threads where the config leaves it open; the loop and the fetcher


def manifest(
    target: str,
    config: RunConfig,
    data: str,
    out: str,
    image: str,
    gpus: int,
    ledger: bool,
    file: str | None,
    more: dict[str, str | None],
) -> str:
    """The YAML for a run with that config. UserError for what could not work there, and for secrets.

    Args:
        target: the template: kuberay or aws.
        image: of the containers.
        gpus: of a machine.
        ledger: of the run.
        file: where the YAML will be.
        more: what else the template has a value for; None where it does without.
    """
    _refuse_unseen(config, data, out)
    words = ["maestream", config.task, "--config", f"{FOLDER}/config.yaml", "--data", data, "--out", out]
    entrypoint = shlex.join([*words, "--ledger"] if ledger else words)
    name = name_of(out)
    dumped = dump_config(config).rstrip()
    values = {
        **sizes(config, gpus),
        **more,
        "name": name,
        "file": file or f"{name}.yaml",
        "config": (shlex.quote(dumped) if target == "aws" else dumped).replace("\n", "\n    "),
        "entrypoint": entrypoint,
        "image": image,
        "folder": FOLDER,
        "ray_version": version("ray"),
        "drain": DRAIN_S,
        "grace": GRACE_S,
    }
    text = _filled((TEMPLATES / f"{target}.yaml").read_text(), values)
    refuse_secrets(text)
    return text


def _filled(template: str, values: dict[str, Any]) -> str:
    """A template with its values, without the lines that are only for a value that there is none of."""
    lines = []
    for line in template.splitlines():
        kept, _, needed = line.partition("  # only with ")
        if not needed or values[needed] is not None:
            lines.append(kept + "\n")
    return Template("".join(lines)).substitute(values)


def name_of(out: str) -> str:
    """A name for the run in `out`, always the same: KubeRay takes 47 letters, and they begin with one."""
    readable = re.sub(r"[^a-z0-9]+", "-", out.rstrip("/").rpartition("/")[2].lower()).strip("-")
    return f"maestream-{readable[:24]}-{hashlib.sha256(out.rstrip('/').encode()).hexdigest()[:6]}"


def sizes(config: RunConfig, gpus: int) -> dict[str, Any]:
    """Machines, and what each of them needs, by the names that the templates have for it."""
    workers, state = config.workers, state_bytes(config)
    snapshots = state if config.checkpoint.snapshots else 0
    shm = 2 * snapshots + OBJECT_STORE + gpus * NCCL
    window = config.data.memory_gb * GIB * min(1, gpus / workers.min)  # the cluster's, when it is smallest
    cache, cache_bytes = config.data.kept_part or (None, 0)
    return {
        "least": math.ceil(workers.min / gpus),
        "most": math.ceil(workers.max / gpus),
        "gpus": gpus,
        "cpus": gpus * ((config.data.threads or THREADS) + OTHER_CORES),
        "shm": math.ceil(shm / GIB),
        # With the copy that a snapshot is written from.
        "memory": math.ceil((shm + snapshots + gpus * PROCESS + window) / GIB),
        "object_store": OBJECT_STORE,
        "cache": cache,
        "cache_gb": math.ceil(1.1 * cache_bytes / GIB),  # who takes more than that is evicted
    }


def state_bytes(config: RunConfig) -> int:
    """Weights and AdamW's two moments, which are most of a snapshot (trainer.snapshot)."""
    with torch.device("meta"):
        model = MAE(config.model) if isinstance(config, PretrainConfig) else Encoder(config.model)
    copies = 4 if isinstance(config, FinetuneConfig) and config.optim.ema else 3
    return copies * sum(parameter.numel() for parameter in model.parameters()) * dtype_of(config).itemsize


def _refuse_unseen(config: RunConfig, data: str, out: str) -> None:
    """UserError for what machines elsewhere cannot see, or shells would read as something else."""
    places = {"--data": data, "--out": out} | places_in(config.model_dump())
    for key, url in places.items():
        if "://" not in url or url.startswith(("file:", "local:", "memory:")):
            raise UserError(f"{key} {url}: workers on other machines cannot see it: give an s3:// URL")
        if shlex.quote(url) != url:
            raise UserError(
                f"{key} {url}: letters, digits and @%+=:,./_- alone get through the shells on its way"
            )
    cache, snapshots = config.data.cache, config.checkpoint.snapshots
    if cache and (not cache.startswith("/") or ":" in cache or shlex.quote(cache) != cache):
        raise UserError(f"data.cache {cache}: give a path from the root on, without spaces and colons")
    if snapshots and Path(SHARED) not in (Path(snapshots), *Path(snapshots).parents):
        raise UserError(
            f"checkpoint.snapshots {snapshots}: machines of a cluster get their memory at {SHARED} alone"
        )


def refuse_secrets(text: str) -> None:
    if has_secret(text):
        raise UserError(
            "keys and passwords do not belong in a manifest: the machines get theirs by --service-account, --secret or "
            "--instance-profile"
        )
