"""Exact scores of predictions: average precision of several classes, R² and mean absolute error of numbers.

The definitions are scikit-learn's: `average_precision_score`, `r2_score` and `mean_absolute_error`.
"""

import numpy as np

from pipeline.arrays import Floats


def average_precision(scores: Floats, positive: Floats) -> float:
    """Return Σ (R_i − R_{i−1}) · P_i over the distinct scores from high to low; NaN if no sample is positive.

    P_i and R_i are precision and recall if all samples with at least that score count as positive, so samples with equal
    scores have no order.

    Args:
        scores: float[n].
        positive: float or bool[n], not 0 if the sample has the class.
    """
    truth = positive > 0
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(truth[order])
    ends = np.append(
        np.flatnonzero(np.diff(ranked)), len(ranked) - 1
    )  # the last sample of each distinct score
    precision = hits[ends] / (ends + 1)
    recall_steps = np.diff(hits[ends], prepend=0) / hits[-1]
    return float(np.sum(recall_steps * precision))


def r2(predicted: Floats, actual: Floats) -> float:
    """Return R², 1 − the sum of squared errors / the sum of squared differences from the mean. float64[n] each.

    If all values are equal, R² is 1 for a perfect prediction and otherwise 0.
    """
    errors = float(np.sum(np.square(actual - predicted)))
    spread = float(np.sum(np.square(actual - actual.mean())))
    if actual.min() == actual.max():
        return 1.0 if errors == 0 else 0.0
    return 1 - errors / spread


def mean_average_precision(scores: Floats, labels: Floats) -> float:
    """Return the mean of the average precision over the classes that have a positive sample, in percent; NaN if none has.

    Args:
        scores, labels: float[n, classes]; labels are 1 where a sample has the class, else 0.
    """
    found = [average_precision(scores[:, i], labels[:, i]) for i in range(labels.shape[1])]
    return mean_of_known(found) * 100


def mean_of_known(values: list[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def r2_and_mae(predicted: Floats, actual: Floats) -> tuple[float, float]:
    """Return R² and the mean absolute error, each the mean over the numbers of a label. float64[n, k] each."""
    columns = range(actual.shape[1])
    return (
        float(np.mean([r2(predicted[:, i], actual[:, i]) for i in columns])),
        float(np.mean(np.abs(actual - predicted))),
    )
