"""k-NN classification: measure an encoder without training anything."""

import torch

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of a neighbour's weight (Wu et al. 2018, arXiv 1805.01978, section 3.4)


def knn_votes(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    neighbours: int = NEIGHBOURS,
    batch_size: int = 256,
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
    bank = torch.nn.functional.normalize(bank, dim=1)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    for first in range(0, len(queries), batch_size):
        batch = torch.nn.functional.normalize(queries[first : first + batch_size], dim=1)
        nearest = (batch @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        # cosine − 1 instead of cosine: the same votes up to a factor, and no large exponentials
        weights = ((nearest.values - 1) / TEMPERATURE).exp().float()
        votes[first : first + batch_size].scatter_add_(1, labels[nearest.indices], weights)
    return votes
