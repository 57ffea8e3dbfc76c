"""Targets and losses of the three kinds of labels: cross-entropy, binary cross-entropy, and mean squared error."""

import torch
import torch.nn.functional as F

from pipeline.dataset.manifest import LabelKind
from trainer.augment.mixing import smooth_targets
from trainer.labels.labels import Labels


@torch.no_grad()
def make_targets(
    batch_labels: torch.Tensor, labels: Labels, smoothing: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return what a head with k outputs shall predict, float[n, k].

    That is a distribution over the classes; a probability for each of several classes; or standardised numbers. Smoothed
    probabilities are those of timm: y · (1 − smoothing) + smoothing / classes.

    Args:
        batch_labels: labels of a batch, see `pipeline.loading.loader.Batch`.
        smoothing: label smoothing of classes; not used for numbers.
        dtype: of standardised numbers. Classes have float32.
    """
    if labels.kind == "class":
        return smooth_targets(batch_labels, labels.outputs, smoothing)
    if labels.kind == "classes":
        return batch_labels * (1 - smoothing) + smoothing / labels.outputs
    return labels.standardise(batch_labels).to(dtype)


def sample_losses(outputs: torch.Tensor, targets: torch.Tensor, kind: LabelKind) -> torch.Tensor:
    """Return the loss of each sample, float[n], of outputs and targets float[n, k].

    Binary cross-entropy and squared error are means over the k classes or numbers, as with torch's and timm's defaults.
    """
    if kind == "class":
        return -(targets * F.log_softmax(outputs, dim=-1)).sum(dim=-1)
    if kind == "classes":
        targets = targets.to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=-1)
    return (outputs - targets).square().mean(dim=-1)
