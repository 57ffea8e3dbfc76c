"""k nearest neighbours: what an encoder is worth without training anything."""

import torch

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of a neighbour's weight (Wu et al. 2018, arXiv 1805.01978, section 3.4)


def neighbours_vote(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    neighbours: int = NEIGHBOURS,
    at_once: int = 256,
) -> torch.Tensor:
    """How much each class is voted for by the nearest neighbours of each query, by cosine: float32[q, classes].

    A neighbour's weight is exp(cosine / TEMPERATURE).

    Args:
        queries: float[q, width].
        bank: float[n, width], of samples whose labels, int64[n], are known.
        at_once: queries, so that memory is at_once · n numbers.
    """
    bank = torch.nn.functional.normalize(bank, dim=1)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    for first in range(0, len(queries), at_once):
        part = torch.nn.functional.normalize(queries[first : first + at_once], dim=1)
        nearest = (part @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        weights = ((nearest.values - 1) / TEMPERATURE).exp().float()  # the same, and exp stays small
        votes[first : first + at_once].scatter_add_(1, labels[nearest.indices], weights)
    return votes
