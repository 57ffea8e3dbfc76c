"""`maestream manifests`: the YAML describes the requested run, on machines of the right number and size."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster.cli.manifests import TASKS
from cluster.deploy.render import (
    DRAIN_S,
    GRACE_S,
    NCCL_BYTES,
    OBJECT_STORE_BYTES,
    cluster_name,
    machines,
    state_bytes,
)
from tests.support.command_line import printed
from tests.support.manifests import (
    BASE,
    DATA,
    FINETUNE,
    ON_AWS,
    OUT,
    TINY,
    aws,
    environment,
    kuberay,
    volumes,
    words_of,
    worker,
)
from trainer.config.model_schema import ModelConfig
from trainer.config.recipe import CONFIG_TYPES, load_config
from trainer.config.schema import FinetuneConfig, PretrainConfig
from trainer.models.mae import MAE
from trainer.run.checkpoint import optimizer_state

GIB = 2**30


@pytest.mark.parametrize(
    ("task", "recipe", "more"),
    [
        ("pretrain", BASE, ("workers={min: 2, max: 64}", "epochs=50", "optim.blr=1e-5")),
        ("pretrain", TINY, ("--ledger", "data.lanes=8", "knn={val: s3://bucket/val, every: 5}")),
        ("finetune", FINETUNE, ("--init", "s3://bucket/runs/base", "--val", "s3://bucket/val", "workers=8")),
        ("linprobe", "recipes/linprobe_vit_base.yaml", ("--init", "scratch")),
    ],
)
def test_the_job_is_the_requested_run(task: str, recipe: str, more: tuple[str, ...], tmp_path: Path) -> None:
    overrides = tuple(word for word in more if "=" in word)
    keys: dict[str, Any] = {}
    if "--init" in more:
        init = more[more.index("--init") + 1]
        keys["init"] = init if init == "scratch" else {"run": init}
    if "--val" in more:
        keys["data"] = {"val": more[more.index("--val") + 1]}
    asked = load_config(CONFIG_TYPES[task], recipe, overrides, keys)

    job, config_map = kuberay(recipe, "--task", task, *more)
    cluster = aws(recipe, "--task", task, *more)
    by_launcher = re.search(
        r"ray job submit --no-wait -- (.*)'$",
        printed("manifests", "aws", *words_of(recipe, "--task", task, *more), *ON_AWS),
        re.MULTILINE,
    )
    assert by_launcher
    entrypoint = job["spec"]["entrypoint"]
    assert by_launcher[1] == entrypoint
    words = shlex.split(entrypoint)
    config = words[3]
    assert words[:3] == ["maestream", task, "--config"]
    assert words[4:] == ["--data", DATA, "--out", OUT, *(["--ledger"] if "--ledger" in more else [])]

    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert volumes(head)[str(Path(config).parent)]["configMap"] == {"name": config_map["metadata"]["name"]}
    (setup,) = cluster["head_setup_commands"]
    make, written = setup.split(" && ", 1)
    assert make == f"mkdir -p {Path(config).parent}"
    printf, form, by_shell, to, path = shlex.split(written)
    assert (printf, form, to, path) == ("printf", "%s\\n", ">", config)
    for text in (config_map["data"][Path(config).name], by_shell):
        (tmp_path / "config.yaml").write_text(text)
        assert load_config(CONFIG_TYPES[task], tmp_path / "config.yaml") == asked


@pytest.mark.parametrize(
    ("workers", "gpus", "least", "most"),
    [
        ("3", 1, 3, 3),
        ("{min: 1, max: 64}", 1, 1, 64),
        ("{min: 1, max: 64}", 8, 1, 8),
        ("{min: 9, max: 20}", 8, 2, 3),
    ],
)
def test_number_of_machines_follows_workers(workers: str, gpus: int, least: int, most: int) -> None:
    more = (f"workers={workers}", "--gpus", str(gpus))
    group = worker(kuberay(TINY, *more)[0])
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (least, least, most)
    asked = group["template"]["spec"]["containers"][0]["resources"]
    assert asked["limits"]["nvidia.com/gpu"] == asked["requests"]["nvidia.com/gpu"] == str(gpus)
    cluster = aws(TINY, *more)
    group_on_aws = cluster["available_node_types"]["workers"]
    assert (group_on_aws["min_workers"], group_on_aws["max_workers"]) == (least, most)
    assert cluster["max_workers"] == most


def test_only_a_cache_gets_a_disk() -> None:
    pod = worker(kuberay(TINY)[0])["template"]["spec"]
    assert set(volumes(pod)) == {"/dev/shm"}
    assert "ephemeral-storage" not in pod["containers"][0]["resources"]["requests"]
    assert "/opt/dlami" not in str(aws(TINY)["docker"])

    cache = ("data.cache=/mnt/nvme/maestream", "data.cache_gb=500")
    pod = worker(kuberay(TINY, *cache)[0])["template"]["spec"]
    limit = volumes(pod)["/mnt/nvme/maestream"]["emptyDir"]["sizeLimit"]
    assert limit == pod["containers"][0]["resources"]["requests"]["ephemeral-storage"]
    assert int(limit.removesuffix("Gi")) > 500
    assert "--volume=/opt/dlami/nvme:/mnt/nvme/maestream" in aws(TINY, *cache)["docker"]["worker_run_options"]


@pytest.mark.parametrize(("recipe", "gpus"), [(BASE, 1), (BASE, 8), ("recipes/pretrain_vit_huge.yaml", 1)])
def test_shared_memory_holds_two_snapshots_and_the_object_store(recipe: str, gpus: int) -> None:
    config = load_config(PretrainConfig, recipe)
    need = 2 * state_bytes(config) + OBJECT_STORE_BYTES + gpus * NCCL_BYTES
    job, _ = kuberay(recipe, "--gpus", str(gpus))
    group = worker(job)
    pod = group["template"]["spec"]
    shm = volumes(pod)["/dev/shm"]["emptyDir"]
    assert shm["medium"] == "Memory"
    assert need <= int(shm["sizeLimit"].removesuffix("Gi")) * GIB < need + GIB
    assert int(group["rayStartParams"]["object-store-memory"]) == OBJECT_STORE_BYTES
    memory = pod["containers"][0]["resources"]["limits"]["memory"]
    assert int(memory.removesuffix("Gi")) * GIB > need + state_bytes(config) + config.data.memory_gb * GIB
    options = aws(recipe, "--gpus", str(gpus))["docker"]["worker_run_options"]
    assert f"--shm-size={shm['sizeLimit'].removesuffix('i').lower()[:-1]}g" in options

    without, _ = kuberay(recipe, "--gpus", str(gpus), "checkpoint.snapshots=null")
    small = volumes(worker(without)["template"]["spec"])["/dev/shm"]["emptyDir"]["sizeLimit"]
    assert small == f"{math.ceil((OBJECT_STORE_BYTES + gpus * NCCL_BYTES) / GIB)}Gi"


def test_state_bytes_is_the_size_of_a_snapshot() -> None:
    shape = {"width": 64, "depth": 2, "heads": 4, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4}
    config = PretrainConfig(model=ModelConfig(**shape), precision="float64")
    model = MAE(config.model).double()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [*model.state_dict().values(), *optimizer_state(model, optimizer).values()]
    there = sum(tensor.nbytes for tensor in state)
    assert 0.999 * there < state_bytes(config) < 1.1 * there  # AdamW counts its steps, too
    # The paper's ViT-B: 2.7 GB for two snapshots, as docs/guides/elastic.md says.
    assert 2 * state_bytes(load_config(PretrainConfig, BASE)) == pytest.approx(2.7e9, rel=0.02)
    averaged = load_config(FinetuneConfig, FINETUNE, ("optim.ema=0.9999",), {"init": "scratch"})
    plain = load_config(FinetuneConfig, FINETUNE, (), {"init": "scratch"})
    assert state_bytes(averaged) * 3 == state_bytes(plain) * 4


def test_cores_follow_decoder_threads() -> None:
    config = load_config(PretrainConfig, TINY, ("data.threads=10",))
    assert machines(config, 2)["cpus"] == 24


def test_head_node_and_shutdown_of_pods() -> None:
    job, _ = kuberay()
    spec = job["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == ray.__version__
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}
    head, pods = spec["headGroupSpec"], worker(job)["template"]["spec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in str(head)
    for pod in (head["template"]["spec"], pods):
        assert pod["restartPolicy"] == "Never"  # as autoscaler v2 wants it
        drains = float(environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drains == DRAIN_S < pod["terminationGracePeriodSeconds"] == GRACE_S
    on_head = environment(head["template"]["spec"])
    assert float(on_head["RAY_JOB_STOP_WAIT_TIME_S"]) < DRAIN_S
    assert any("spot" in toleration["key"] for toleration in pods["tolerations"])
    # Workers prefer the machines that the head avoids. One label each: a machine has only the labels of its cloud.
    elsewhere = head["template"]["spec"]["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    (avoided,) = [term["matchExpressions"] for term in elsewhere["nodeSelectorTerms"]]
    liked = pods["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert [term["preference"]["matchExpressions"] for term in liked] == [
        [label | {"operator": "In"}] for label in avoided
    ]
    assert {label["operator"] for label in avoided} == {"NotIn"}

    cluster = aws()
    types = cluster["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["workers"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster["provider"]["region"] == "us-east-1"
    settings = Path("docs/guides/elastic.md").read_text()
    options = cluster["docker"]["head_run_options"]
    for name, value in on_head.items():
        if name.startswith(("RAY_health", "RAY_JOB")):  # the settings that the documentation recommends
            assert f"{name}={value}" in settings
            assert f"--env={name}={value}" in options


def test_access_comes_from_accounts_and_secrets() -> None:
    job, _ = kuberay(TINY)
    assert "serviceAccountName" not in str(job)
    assert "envFrom" not in str(job)
    job, _ = kuberay(TINY, "--service-account", "7", "--secret", "null")
    spec = job["spec"]["rayClusterSpec"]
    for pod in (spec["headGroupSpec"]["template"]["spec"], worker(job)["template"]["spec"]):
        assert pod["serviceAccountName"] == "7"  # as a name
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "null"}}]
    for node_type in aws()["available_node_types"].values():
        assert node_type["node_config"]["IamInstanceProfile"] == {"Name": "maestream"}


def test_cluster_names() -> None:
    outs = ("s3://b/runs/base", "s3://b/other/base", "s3://b/" + "Ünd_" * 40, "s3://b/7", "s3://b")
    names = {cluster_name(out) for out in outs}
    assert len(names) == len(outs)
    for name in names:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name)  # RFC 1035, and KubeRay's 47
    assert cluster_name("s3://b/runs/base/") == cluster_name("s3://b/runs/base")
    assert tuple(CONFIG_TYPES) == TASKS


def test_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    assert f"wrote {path}" in printed("manifests", "kuberay", *words_of(), "--to", path)
    assert path.read_text() == printed("manifests", "kuberay", *words_of()).replace(
        f"{cluster_name(OUT)}.yaml", str(path)
    )
