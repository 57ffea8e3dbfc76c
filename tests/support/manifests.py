"""Render cluster manifests with `maestream manifests`, and read them."""

from typing import Any

import yaml

from tests.support.command_line import printed

BASE, TINY, FINETUNE = (
    f"recipes/{n}.yaml" for n in ("pretrain_vit_base", "pretrain_vit_tiny", "finetune_vit_base")
)
DATA, OUT = "s3://bucket/photos", "s3://bucket/runs/base"
ON_AWS = ("--zone", "us-east-1a,us-east-1b", "--machine", "g6e.4xlarge", "--instance-profile", "maestream")
Manifest = Any


def words_of(recipe: str = BASE, *more: str, data: str = DATA, out: str = OUT) -> tuple[str, ...]:
    return (
        "--config",
        recipe,
        "--data",
        data,
        "--out",
        out,
        "--image",
        "registry.example/maestream:1",
        *more,
    )


def kuberay(recipe: str = BASE, *more: str) -> tuple[Manifest, Manifest]:
    """Render for KubeRay; return the RayJob and its ConfigMap."""
    config, job = yaml.safe_load_all(printed("manifests", "kuberay", *words_of(recipe, *more)))
    return job, config


def aws(recipe: str = BASE, *more: str) -> Manifest:
    return yaml.safe_load(printed("manifests", "aws", *words_of(recipe, *more), *ON_AWS))


def worker(job: Manifest) -> Manifest:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def volumes(pod: Manifest) -> dict[str, Any]:
    """Return the volumes of a pod, by the path where they are mounted."""
    there = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = pod["containers"][0]["volumeMounts"]
    assert {mount["name"] for mount in mounts} == set(there)
    return {mount["mountPath"]: there[mount["name"]] for mount in mounts}


def environment(pod: Manifest) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
