"""A cluster of raylets, and a recipe for a run on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.support.training.raylets import SMALL

RECIPE = """
global_batch: 12
epochs: 60            # of 5 steps
log_every: 5
workers: {min: 1, max: 3}
precision: float64
micro_batch: 1        # for steps of some 50 ms
checkpoint: {every_steps: 100}
model: {image_size: 48, patch_size: 8, width: 48, depth: 2, heads: 3,
        decoder_width: 32, decoder_depth: 1, decoder_heads: 2}
optim: {blr: 0.05, warmup_epochs: 1}
data: {lanes: 6, block: 8}
"""


@pytest.fixture(scope="session")
def elastic_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs that notices a dead node within seconds."""
    for name, value in (("period_ms", 1000), ("timeout_ms", 1000), ("failure_threshold", 3)):
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    made = Cluster()
    try:
        made.add_node(num_cpus=0, **SMALL)
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
