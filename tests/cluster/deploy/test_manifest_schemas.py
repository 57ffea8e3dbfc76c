"""The manifests fit the schemas of KubeRay and of Ray's cluster launcher."""

from typing import Any

import pytest
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.support.manifests import TINY, aws, kuberay


def paths(tree: Any, prefix: str = "") -> dict[str, str]:
    """Return the type of each field of a manifest, by its path. List items are [], keys that users choose are *."""
    if isinstance(tree, list):
        return {path: kind for item in tree for path, kind in paths(item, prefix + "[]").items()}
    if not isinstance(tree, dict):
        return {prefix: type(tree).__name__}
    free = prefix.endswith(("annotations", "rayStartParams", "requests", "limits"))
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= paths(value, f"{prefix}.{'*' if free else key}".lstrip("."))
    return found


# The fields that our manifests use, from KubeRay v1.7.0, helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml. Rendered manifests
# were validated against that whole schema (25,400 lines) and that of v1.5.1, with unknown fields forbidden, and their pod templates
# against Kubernetes 1.29 and 1.37 (kubernetes-validate --strict). Repeat this before adding a field here.
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


def test_every_field_is_in_kuberays_schema() -> None:
    everything = ("--service-account", "a", "--secret", "b", "data.cache=/mnt/x", "data.cache_gb=1")
    job, _ = kuberay(TINY, *everything)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    known = dict(line.split() for line in FIELDS.strip().splitlines())
    found = paths(job)
    assert found == known, sorted(found.items() ^ known.items())


@pytest.mark.parametrize("more", [(), ("data.cache=/mnt/x", "data.cache_gb=1", "workers={min: 2, max: 9}")])
def test_rays_cluster_launcher_accepts_the_manifest(
    more: tuple[str, ...],
) -> None:
    """Use Ray's own validation (ray-schema.json) with its defaults filled in, as `ray up` does."""
    cluster = aws(TINY, *more)
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["setup_commands"] == []  # Ray's default installs another Ray
    assert prepared["available_node_types"]["workers"] == cluster["available_node_types"]["workers"]
    assert prepared["docker"] == cluster["docker"]
    with pytest.raises(ValidationError):
        validate_config({**prepared, "max_worker": 1})
