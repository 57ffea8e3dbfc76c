"""k-NN: measure an encoder by the labels of nearest neighbours, without training anything."""

from collections.abc import Iterator

import torch

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of a neighbour's weight (Wu et al. 2018, arXiv 1805.01978, section 3.4)
QUERIES = 256  # at a time, so that memory is QUERIES times the number of reference samples


def knn_votes(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    neighbours: int = NEIGHBOURS,
    batch_size: int = QUERIES,
) -> torch.Tensor:
    """Let the nearest neighbours of each query, by cosine similarity, vote for their classes.

    A neighbour's vote has the weight exp(cosine / TEMPERATURE), up to a constant factor.

    Args:
        queries: float[q, width].
        bank: float[n, width], features of reference samples.
        labels: int64[n], labels of the reference samples.
        batch_size: queries at a time, so that memory is batch_size · n numbers.

    Returns float32[q, classes], the sum of weights per class.
    """
    votes = torch.zeros(len(queries), classes, device=bank.device)
    for first, nearest, weights in _nearest(queries, bank, neighbours, batch_size):
        votes[first : first + len(weights)].scatter_add_(1, labels[nearest], weights)
    return votes


def knn_means(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    neighbours: int = NEIGHBOURS,
    batch_size: int = QUERIES,
) -> torch.Tensor:
    """Return the mean of the labels of each query's nearest neighbours, weighted as in `knn_votes`.

    For labels that are several classes, 0 or 1, that is each class's share of the votes.

    Args:
        labels: float[n, k], labels of the reference samples. The others are those of `knn_votes`.

    Returns float64[q, k].
    """
    means = torch.zeros(len(queries), labels.shape[1], device=bank.device, dtype=torch.float64)
    for first, nearest, weights in _nearest(queries, bank, neighbours, batch_size):
        shares = weights.double() / weights.double().sum(dim=1, keepdim=True)
        for i in range(shares.shape[1]):  # one neighbour at a time: q · k numbers of memory
            means[first : first + len(weights)] += shares[:, i : i + 1] * labels[nearest[:, i]]
    return means


def _nearest(
    queries: torch.Tensor, bank: torch.Tensor, neighbours: int, batch_size: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield for each batch of queries: the first one's row, the rows of their neighbours in the bank (int64[q, neighbours]),
    and the weights of these (float32[q, neighbours])."""
    bank = torch.nn.functional.normalize(bank, dim=1)
    for first in range(0, len(queries), batch_size):
        batch = torch.nn.functional.normalize(queries[first : first + batch_size], dim=1)
        nearest = (batch @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        # cosine − 1 instead of cosine: the same votes up to a factor, and no large exponentials
        yield first, nearest.indices, ((nearest.values - 1) / TEMPERATURE).exp().float()
