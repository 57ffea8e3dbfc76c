"""mAP, R² and mean absolute error are scikit-learn's, with ties, classes without positives and unreadable samples."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    log_loss,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
)

from pipeline.errors import UserError
from trainer.evaluate import predictions
from trainer.evaluate.knn import knn_means, knn_votes
from trainer.evaluate.predictions import Predictions, score
from trainer.labels.labels import Labels
from trainer.labels.scores import average_precision, mean_average_precision, r2_and_mae
from trainer.run.worker import Worker

FEW_SCORES = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.5])  # so that many are equal


def dataset_of(samples: int) -> Any:
    return SimpleNamespace(samples=samples, store=SimpleNamespace(url="shards/val"))


@given(st.lists(st.tuples(FEW_SCORES, st.booleans()), min_size=1, max_size=40))
def test_average_precision_is_that_of_scikit_learn(samples: list[tuple[float, bool]]) -> None:
    scores, positive = np.array([s for s, _ in samples]), np.array([p for _, p in samples])
    found = average_precision(scores, positive.astype(float))
    if not positive.any():
        assert np.isnan(found)
    else:
        assert found == pytest.approx(average_precision_score(positive, scores), rel=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(0, 2), st.integers(2, 30), st.integers(1, 12))
def test_scores_of_several_classes_are_those_of_scikit_learn(
    seed: int, decimals: int, samples: int, classes: int
) -> None:
    """Rounded scores have ties, rare classes have no positives, and some samples cannot be read."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(samples, classes)).round(decimals)
    truth = (rng.random((samples, classes)) < rng.random(classes) ** 2).astype(np.float32)
    readable = rng.random(samples) < 0.8
    labels = Labels(kind="classes", outputs=classes)
    own = Predictions(*map(torch.from_numpy, (logits, truth, readable)))
    good, some = truth[readable], truth[readable].any(axis=0)
    if not some.any():
        with pytest.raises(UserError, match=r"no image (has any class|can be read)"):
            score(own, labels, dataset_of(samples), Worker())
        return
    found = score(own, labels, dataset_of(samples), Worker())
    expected = average_precision_score(good[:, some], logits[readable][:, some], average="macro")
    assert found["val_map"] == pytest.approx(100 * expected, rel=1e-12)
    assert mean_average_precision(logits[readable], good) == pytest.approx(found["val_map"], rel=1e-12)
    probabilities = 1 / (1 + np.exp(-logits[readable]))
    losses = [log_loss(good[:, i], probabilities[:, i], labels=[0, 1]) for i in range(classes)]
    assert found["val_loss"] == pytest.approx(np.mean(losses), rel=1e-9)
    assert found["val_bad"] == samples - readable.sum()


@settings(max_examples=50)
@given(
    st.integers(0, 2**31), st.integers(2, 30), st.integers(1, 4), st.floats(-1e4, 1e4), st.floats(1e-2, 1e3)
)
def test_scores_of_numbers_are_those_of_scikit_learn(
    seed: int, samples: int, numbers: int, mean: float, deviation: float
) -> None:
    rng = np.random.default_rng(seed)
    actual = (mean + deviation * rng.normal(size=(samples, numbers))).astype(np.float32)
    predicted = actual + deviation * rng.normal(size=(samples, numbers))
    readable = rng.random(samples) < 0.8
    readable[:2] = True
    labels = Labels(kind="numbers", outputs=numbers, mean=(mean,) * numbers, deviation=(deviation,) * numbers)
    own = Predictions(*map(torch.from_numpy, (predicted, actual, readable)))
    found = score(own, labels, dataset_of(samples), Worker())
    truth, guess = actual[readable].astype(float), predicted[readable]
    assert found["val_mae"] == pytest.approx(mean_absolute_error(truth, guess), rel=1e-9)
    assert found["val_r2"] == pytest.approx(r2_score(truth, guess), rel=1e-6, abs=1e-9)
    assert found["val_loss"] == pytest.approx(mean_squared_error(truth, guess) / deviation**2, rel=1e-9)
    assert r2_and_mae(guess, truth) == pytest.approx((found["val_r2"], found["val_mae"]), rel=1e-9)


@pytest.mark.parametrize("value", [3.0, 0.1, 1e30])
def test_r2_of_equal_numbers_is_one_or_zero(value: float) -> None:
    """As scikit-learn defines it. Its rounding errors make other values of numbers such as 0.1."""
    same = np.full((7, 1), value)
    for guess, expected in ((same, 1.0), (same * 2, 0.0)):
        assert r2_and_mae(guess, same)[0] == expected
        if value == 3.0:
            assert r2_score(same, guess) == expected


def test_blocks_of_classes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    logits, truth = rng.normal(size=(50, 9)), (rng.random((50, 9)) < 0.3).astype(np.float32)
    own = Predictions(torch.from_numpy(logits), torch.from_numpy(truth), torch.ones(50, dtype=torch.bool))
    labels = Labels(kind="classes", outputs=9)
    whole = score(own, labels, dataset_of(50), Worker())
    monkeypatch.setattr(predictions, "COLUMNS", 2)
    assert score(own, labels, dataset_of(50), Worker()) == whole


@pytest.mark.parametrize(
    ("outputs", "readable", "message"),
    [
        (np.nan, True, "the model's outputs for shards/val are not finite: use an earlier checkpoint"),
        (0.0, False, "shards/val: no image can be read, so there is nothing to evaluate"),
    ],
)
def test_what_cannot_be_measured_is_said(outputs: float, readable: bool, message: str) -> None:
    for kind in ("classes", "numbers"):
        labels = Labels(kind=kind, outputs=2, mean=(0.0, 0.0), deviation=(1.0, 1.0))
        values = torch.ones(4, 2)
        values[0, 1] = outputs
        own = Predictions(values, torch.ones(4, 2), torch.full((4,), readable))
        with pytest.raises(UserError, match=message):
            score(own, labels, dataset_of(4), Worker())


def test_neighbours_means_are_shares_of_their_votes() -> None:
    rng = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 6, generator=rng) for n in (90, 40))
    labels = torch.randint(0, 5, (90,), generator=rng)
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    votes = knn_votes(queries, bank, labels, 5, neighbours=7, batch_size=16)
    shares = knn_means(queries, bank, one_hot, neighbours=7, batch_size=16)
    torch.testing.assert_close(shares.float(), votes / votes.sum(dim=1, keepdim=True))


def test_neighbours_predict_weighted_means_of_numbers() -> None:
    rng = np.random.default_rng(1)
    bank, queries, numbers = (rng.normal(size=shape) for shape in ((60, 4), (9, 4), (60, 2)))
    found = knn_means(*map(torch.from_numpy, (queries, bank, numbers)), neighbours=5).numpy()
    for query, means in zip(queries, found, strict=True):
        cosines = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-cosines)[:5]
        weights = np.exp((cosines[nearest] - 1) / 0.07)
        np.testing.assert_allclose(means, np.average(numbers[nearest], axis=0, weights=weights), rtol=1e-5)
