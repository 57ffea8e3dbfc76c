"""What encoders are measured by, against independent formulas."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.loading.loader import TrainBatch
from pipeline.stage_times import StageTimes
from trainer.config.recipe import parse_config
from trainer.config.schema import FinetuneConfig
from trainer.evaluate.knn import knn_votes
from trainer.group.gradients import GradientSum
from trainer.group.group import Group
from trainer.labels.labels import Labels
from trainer.models.classifier import Classifier
from trainer.run.worker import Worker
from trainer.step.optim import layered_adamw
from trainer.step.step import TrainedModel
from trainer.train.finetune import finetune_step
from trainer.train.linprobe import NORM_EPS, batch_moments, normalise, update_running_statistics


def test_neighbours_by_numpy() -> None:
    """Wu et al. 2018, section 3.4: each of the k nearest votes with exp(cosine / 0.07)."""
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(200, 6)), rng.normal(size=(50, 6))
    labels = rng.integers(0, 5, 200)
    votes = knn_votes(
        *(torch.from_numpy(x) for x in (queries, bank, labels)), classes=5, neighbours=20, batch_size=16
    )
    for query, vote in zip(queries, votes.numpy(), strict=True):
        cosines = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        expected = np.zeros(5)
        for i in np.argsort(-cosines)[:20]:
            expected[labels[i]] += np.exp(cosines[i] / 0.07)
        np.testing.assert_allclose(vote / vote.sum(), expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize(("good", "bad"), [(2, 0), (5, 3), (40, 1), (17, 20)])
def test_batch_statistics_are_torchs_over_good_samples(good: int, bad: int) -> None:
    rng = torch.Generator().manual_seed(good)
    norm, theirs = (nn.BatchNorm1d(4, eps=NORM_EPS, affine=False, dtype=torch.float64) for _ in range(2))
    for _ in range(3):
        x = torch.randn(good + bad, 4, generator=rng, dtype=torch.float64) * 3 + 1
        weights = torch.cat([torch.ones(good), torch.zeros(bad)])
        moments = batch_moments(x, weights, Group())
        torch.testing.assert_close(normalise(x, moments)[:good], theirs(x[:good]))
        update_running_statistics(norm, moments)
    torch.testing.assert_close(norm.running_mean, theirs.running_mean)
    torch.testing.assert_close(norm.running_var, theirs.running_var)


class Looked(nn.Module):
    """A model that keeps what it was shown."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, images: torch.Tensor, kept: torch.Tensor | None, normalised: bool) -> torch.Tensor:
        self.seen.append(images)
        return self.model(images, kept, normalised)


def test_lower_precision_changes_no_augmentation() -> None:
    """Autocast would make the grids of rotations bf16, and so images blurred and moved."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 64, 64), generator=rng, dtype=torch.uint8)
    ids = torch.arange(64)
    batch = TrainBatch(images, ids % 7, ids, torch.ones(64), {}, StageTimes(), step=0, epoch=0, wait_s=0.0)
    shape = {"image_size": 64, "patch_size": 32, "width": 24, "depth": 1, "heads": 3}
    seen = {}
    for precision in ("float32", "bf16"):
        tree: dict[str, Any] = {"init": "scratch", "global_batch": 64, "micro_batch": 16, "model": shape}
        tree |= {"precision": precision, "data": {"lanes": 16, "block": 8}}
        config = parse_config(FinetuneConfig, tree, "test")
        model = Classifier(config.model, 7)
        looked = Looked(model)
        optimizer = layered_adamw(model, 1, config.optim, 0.75)
        trained = TrainedModel(looked, GradientSum(model, Group()))
        finetune_step(trained, model, optimizer, batch, config, Worker(), Labels(kind="class", outputs=7))
        seen[precision] = torch.cat(looked.seen)
        assert len(looked.seen) == 4
    assert seen["bf16"].dtype == torch.float32
    assert torch.equal(seen["bf16"], seen["float32"])
