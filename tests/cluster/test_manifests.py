"""What `maestream manifests` renders is the run that was asked for, fits the schemas, and holds no secret."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from conftest import printed, refused
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.deploy import TASKS
from cluster.render import DRAIN_S, GRACE_S, NCCL, OBJECT_STORE, name_of, sizes, state_bytes
from trainer.checkpoint import optimizer_state
from trainer.config import FinetuneConfig, ModelConfig, PretrainConfig
from trainer.mae import MAE
from trainer.recipe import KINDS, load_config

BASE, TINY, FINETUNE = (
    f"recipes/{n}.yaml" for n in ("pretrain_vit_base", "pretrain_vit_tiny", "finetune_vit_base")
)
DATA, OUT = "s3://bucket/photos", "s3://bucket/runs/base"
ON_AWS = ("--zone", "us-east-1a,us-east-1b", "--machine", "g6e.4xlarge", "--instance-profile", "maestream")
GIB = 2**30
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
    """The RayJob and its ConfigMap."""
    config, job = yaml.safe_load_all(printed("manifests", "kuberay", *words_of(recipe, *more)))
    return job, config


def aws(recipe: str = BASE, *more: str) -> Manifest:
    return yaml.safe_load(printed("manifests", "aws", *words_of(recipe, *more), *ON_AWS))


def worker(job: Manifest) -> Manifest:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def volumes(pod: Manifest) -> dict[str, Any]:
    """Where each volume is mounted, and what it is."""
    there = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = pod["containers"][0]["volumeMounts"]
    assert {mount["name"] for mount in mounts} == set(there)
    return {mount["mountPath"]: there[mount["name"]] for mount in mounts}


def environment(pod: Manifest) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}


@pytest.mark.parametrize(
    ("task", "recipe", "more"),
    [
        ("pretrain", BASE, ("workers={min: 2, max: 64}", "epochs=50", "optim.blr=1e-5")),
        ("pretrain", TINY, ("--ledger", "data.lanes=8", "knn={val: s3://bucket/val, every: 5}")),
        ("finetune", FINETUNE, ("--init", "s3://bucket/runs/base", "--val", "s3://bucket/val", "workers=8")),
        ("linprobe", "recipes/linprobe_vit_base.yaml", ("--init", "scratch")),
    ],
)
def test_the_job_is_the_run_that_was_asked_for(
    task: str, recipe: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = tuple(word for word in more if "=" in word)
    keys: dict[str, Any] = {}
    if "--init" in more:
        init = more[more.index("--init") + 1]
        keys["init"] = init if init == "scratch" else {"run": init}
    if "--val" in more:
        keys["data"] = {"val": more[more.index("--val") + 1]}
    asked = load_config(KINDS[task], recipe, overrides, keys)

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
        assert load_config(KINDS[task], tmp_path / "config.yaml") == asked


@pytest.mark.parametrize(
    ("workers", "gpus", "least", "most"),
    [
        ("3", 1, 3, 3),
        ("{min: 1, max: 64}", 1, 1, 64),
        ("{min: 1, max: 64}", 8, 1, 8),
        ("{min: 9, max: 20}", 8, 2, 3),
    ],
)
def test_machines_follow_workers(workers: str, gpus: int, least: int, most: int) -> None:
    more = (f"workers={workers}", "--gpus", str(gpus))
    group = worker(kuberay(TINY, *more)[0])
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (least, least, most)
    asked = group["template"]["spec"]["containers"][0]["resources"]
    assert asked["limits"]["nvidia.com/gpu"] == asked["requests"]["nvidia.com/gpu"] == str(gpus)
    cluster = aws(TINY, *more)
    machines = cluster["available_node_types"]["workers"]
    assert (machines["min_workers"], machines["max_workers"]) == (least, most)
    assert cluster["max_workers"] == most


def test_a_cache_has_a_disk_and_nothing_else_has() -> None:
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
    need = 2 * state_bytes(config) + OBJECT_STORE + gpus * NCCL
    job, _ = kuberay(recipe, "--gpus", str(gpus))
    group = worker(job)
    pod = group["template"]["spec"]
    shm = volumes(pod)["/dev/shm"]["emptyDir"]
    assert shm["medium"] == "Memory"
    assert need <= int(shm["sizeLimit"].removesuffix("Gi")) * GIB < need + GIB
    assert int(group["rayStartParams"]["object-store-memory"]) == OBJECT_STORE
    memory = pod["containers"][0]["resources"]["limits"]["memory"]
    assert int(memory.removesuffix("Gi")) * GIB > need + state_bytes(config) + config.data.memory_gb * GIB
    options = aws(recipe, "--gpus", str(gpus))["docker"]["worker_run_options"]
    assert f"--shm-size={shm['sizeLimit'].removesuffix('i').lower()[:-1]}g" in options

    without, _ = kuberay(recipe, "--gpus", str(gpus), "checkpoint.snapshots=null")
    small = volumes(worker(without)["template"]["spec"])["/dev/shm"]["emptyDir"]["sizeLimit"]
    assert small == f"{math.ceil((OBJECT_STORE + gpus * NCCL) / GIB)}Gi"


def test_the_state_is_what_a_snapshot_has() -> None:
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
    # The paper's ViT-B: 2.7 GB for two of them, as the README says.
    assert 2 * state_bytes(load_config(PretrainConfig, BASE)) == pytest.approx(2.7e9, rel=0.02)
    averaged = load_config(FinetuneConfig, FINETUNE, ("optim.ema=0.9999",), {"init": "scratch"})
    plain = load_config(FinetuneConfig, FINETUNE, (), {"init": "scratch"})
    assert state_bytes(averaged) * 3 == state_bytes(plain) * 4


def test_threads_are_cores() -> None:
    config = load_config(PretrainConfig, TINY, ("data.threads=10",))
    assert sizes(config, 2)["cpus"] == 24


def test_the_head_and_the_end_of_pods() -> None:
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
    # Workers prefer the very machines that the head avoids: on one label each, as a machine has those of one cloud alone.
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
    readme = Path("README.md").read_text()
    options = cluster["docker"]["head_run_options"]
    for name, value in on_head.items():
        if name.startswith(("RAY_health", "RAY_JOB")):  # what the README names
            assert f"{name}={value}" in readme
            assert f"--env={name}={value}" in options


def test_rights_come_from_elsewhere() -> None:
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


def test_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    for target, more in (("kuberay", ()), ("aws", ON_AWS)):
        text = printed("manifests", target, *words_of(), *more)
        assert "EXAMPLE" not in text
        assert not re.search(
            r"(?i)secret|password|ssh_private_key|KeyName", text.replace("a Secret of it", "")
        )


def test_names() -> None:
    outs = ("s3://b/runs/base", "s3://b/other/base", "s3://b/" + "Ünd_" * 40, "s3://b/7", "s3://b")
    names = {name_of(out) for out in outs}
    assert len(names) == len(outs)
    for name in names:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name)  # RFC 1035, and KubeRay's 47
    assert name_of("s3://b/runs/base/") == name_of("s3://b/runs/base")
    assert tuple(KINDS) == TASKS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            words_of(data="photos"),
            "--data photos: workers on other machines cannot see it: give an s3:// URL",
        ),
        (words_of(out="runs/base"), "--out runs/base: workers on other machines"),
        (words_of(out="file:///runs"), "--out file:///runs: workers on other machines"),
        (words_of(TINY, "knn={val: shards/val}"), "/shards/val: workers on other machines"),
        (words_of(FINETUNE, "--task", "finetune", "--init", "runs/base"), "/runs/base: workers on other"),
        (words_of(FINETUNE, "--task", "finetune"), "init: say whose encoder it begins with"),
        (words_of(data="s3://bucket/$(id)"), "get through the shells"),
        (words_of(BASE, "wrokers=3"), "there is no key wrokers: did you mean workers?"),
        (words_of("recipes/none.yaml"), "no such config"),
        (words_of(BASE, "--image", "an image"), "no name of an image"),
        (
            words_of(BASE, "data.cache=cache", "data.cache_gb=1"),
            "data.cache cache: give a path from the root",
        ),
        (words_of(BASE, "checkpoint.snapshots=/mnt/ram"), "get their memory at /dev/shm alone"),
    ],
)
def test_refused(words: tuple[str, ...], said: str) -> None:
    for target, more in (("kuberay", ()), ("aws", ON_AWS)):
        message = refused("manifests", target, *words, *more)
        assert said in message


@pytest.mark.parametrize(
    "words",
    [
        words_of(BASE, "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI"),
        words_of(BASE, "aws_access_key_id=x"),
        words_of(data="s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/photos"),
        words_of(out="s3://user:wJalrXUtnFEMI@bucket/runs"),
        words_of(BASE, "data.cache=/mnt/ASIAIOSFODNN7EXAMPLE", "data.cache_gb=1"),
    ],
)
def test_secrets_are_refused_and_not_repeated(words: tuple[str, ...]) -> None:
    for target, more in (("kuberay", ()), ("aws", ON_AWS)):
        message = refused("manifests", target, *words, *more)
        assert "keys and passwords do not belong in a manifest" in message
        assert "wJalrXUtnFEMI" not in message
        assert "EXAMPLE" not in message


def test_a_secret_in_a_recipe_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {cache: /mnt/AKIAIOSFODNN7EXAMPLE, cache_gb: 1}\n")
    assert "keys and passwords" in refused("manifests", "kuberay", *words_of(str(recipe)))


def test_refused_of_one_of_them() -> None:
    assert "--secret No_Name: that is no name" in refused(
        "manifests", "kuberay", *words_of(), "--secret", "No_Name"
    )
    assert "--zone mars: write us-east-1a" in refused(
        "manifests", "aws", *words_of(), *ON_AWS, "--zone", "mars"
    )
    assert "several of a region" in refused(
        "manifests", "aws", *words_of(), *ON_AWS, "--zone", "us-east-1a,eu-west-1b"
    )
    assert "--machine a b: that is no name" in refused(
        "manifests", "aws", *words_of(), *ON_AWS, "--machine", "a b"
    )


def test_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    assert f"→ {path}" in printed("manifests", "kuberay", *words_of(), "--to", path)
    assert path.read_text() == printed("manifests", "kuberay", *words_of()).replace(
        f"{name_of(OUT)}.yaml", str(path)
    )


# ---- schemas


def paths(tree: Any, prefix: str = "") -> dict[str, str]:
    """Each field of a manifest and its type; list items as [], keys that are the user's own as *."""
    if isinstance(tree, list):
        return {path: kind for item in tree for path, kind in paths(item, prefix + "[]").items()}
    if not isinstance(tree, dict):
        return {prefix: type(tree).__name__}
    free = prefix.endswith(("annotations", "rayStartParams", "requests", "limits"))
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= paths(value, f"{prefix}.{'*' if free else key}".lstrip("."))
    return found


# Of KubeRay v1.7.0, helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml: all that we use was there, with these types, when what
# is rendered passed the whole schema, nothing unknown allowed (25,400 lines; v1.5.1's too), and its pod templates that of
# Kubernetes 1.29 and 1.37 (kubernetes-validate --strict). Something new belongs here once it has passed them.
FIELDS = """
apiVersion str
kind str
metadata.name str
spec.entrypoint str
spec.submissionMode str
spec.backoffLimit int
spec.shutdownAfterJobFinishes bool
spec.ttlSecondsAfterFinished int
spec.rayClusterSpec.rayVersion str
spec.rayClusterSpec.authOptions.mode str
spec.rayClusterSpec.enableInTreeAutoscaling bool
spec.rayClusterSpec.autoscalerOptions.version str
spec.rayClusterSpec.autoscalerOptions.idleTimeoutSeconds int
spec.rayClusterSpec.headGroupSpec.rayStartParams.* str
spec.rayClusterSpec.headGroupSpec.template.metadata.annotations.* str
spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy str
spec.rayClusterSpec.headGroupSpec.template.spec.terminationGracePeriodSeconds int
spec.rayClusterSpec.headGroupSpec.template.spec.serviceAccountName str
spec.rayClusterSpec.headGroupSpec.template.spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[].matchExpressions[].key str
spec.rayClusterSpec.headGroupSpec.template.spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[].matchExpressions[].operator str
spec.rayClusterSpec.headGroupSpec.template.spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[].matchExpressions[].values[] str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].name str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].image str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].envFrom[].secretRef.name str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].env[].name str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].env[].value str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].ports[].name str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].ports[].containerPort int
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].resources.requests.* str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].resources.limits.* str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].volumeMounts[].name str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].volumeMounts[].mountPath str
spec.rayClusterSpec.headGroupSpec.template.spec.containers[].volumeMounts[].readOnly bool
spec.rayClusterSpec.headGroupSpec.template.spec.volumes[].name str
spec.rayClusterSpec.headGroupSpec.template.spec.volumes[].configMap.name str
spec.rayClusterSpec.workerGroupSpecs[].groupName str
spec.rayClusterSpec.workerGroupSpecs[].replicas int
spec.rayClusterSpec.workerGroupSpecs[].minReplicas int
spec.rayClusterSpec.workerGroupSpecs[].maxReplicas int
spec.rayClusterSpec.workerGroupSpecs[].rayStartParams.* str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.restartPolicy str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.terminationGracePeriodSeconds int
spec.rayClusterSpec.workerGroupSpecs[].template.spec.serviceAccountName str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.tolerations[].key str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.tolerations[].operator str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.tolerations[].effect str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.tolerations[].value str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[].weight int
spec.rayClusterSpec.workerGroupSpecs[].template.spec.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[].preference.matchExpressions[].key str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[].preference.matchExpressions[].operator str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[].preference.matchExpressions[].values[] str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].name str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].image str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].envFrom[].secretRef.name str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].env[].name str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].env[].value str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].resources.requests.* str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].resources.limits.* str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].volumeMounts[].name str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].volumeMounts[].mountPath str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.volumes[].name str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.volumes[].emptyDir.medium str
spec.rayClusterSpec.workerGroupSpecs[].template.spec.volumes[].emptyDir.sizeLimit str
"""


def test_every_field_is_one_that_kuberay_has() -> None:
    everything = ("--service-account", "a", "--secret", "b", "data.cache=/mnt/x", "data.cache_gb=1")
    job, _ = kuberay(TINY, *everything)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    known = dict(line.split() for line in FIELDS.strip().splitlines())
    found = paths(job)
    assert found == known, sorted(found.items() ^ known.items())


@pytest.mark.parametrize("more", [(), ("data.cache=/mnt/x", "data.cache_gb=1", "workers={min: 2, max: 9}")])
def test_ray_takes_what_is_for_its_cluster_launcher(
    more: tuple[str, ...],
) -> None:
    """By its own check (ray-schema.json), with its own defaults filled in, as `ray up` does."""
    cluster = aws(TINY, *more)
    whole = prepare_config(cluster)
    validate_config(whole)
    assert whole["setup_commands"] == []  # Ray's default installs another Ray
    assert whole["available_node_types"]["workers"] == cluster["available_node_types"]["workers"]
    assert whole["docker"] == cluster["docker"]
    with pytest.raises(ValidationError):
        validate_config({**whole, "max_worker": 1})
