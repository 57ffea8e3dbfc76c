"""Accuracy of a classifier over a dataset: every sample counts exactly once, at any world size."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.arrays import Ints
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import NO_LABEL
from pipeline.decode.decoder import Decoder
from pipeline.errors import UserError
from pipeline.loading.loader import Batch, centred_batch
from pipeline.parallel import map_ahead
from trainer.run.worker import Worker

PREFETCH = 2  # batches that are decoded ahead
SUM_COLUMNS = ("samples", "top1", "top5", "loss", "bad")


def evaluate(
    logits: Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    decoder: Decoder,
    crop: float,
    batch: int,
    worker: Worker,
) -> dict[str, float]:
    """Evaluate a classifier on all samples of a dataset. Every rank must call this; all get the same result.

    A sample that cannot be read counts as wrong, with the loss of a uniform prediction.

    Args:
        logits: maps pixels [n, c, h, w] → float[n, classes] on the worker's device.
        crop: side of the centre crop, divided by the image's shorter side.
        batch: samples per forward pass.

    Returns `val_top1` and `val_top5` in percent, the mean `val_loss`, and `val_bad`, the number of unreadable samples.
    Raises UserError if a sample has no label.
    """
    ids = np.array_split(np.arange(dataset.samples), worker.world_size)[worker.rank]
    sums = sum_metrics(logits, dataset, decoder, crop, batch, ids, worker.device)
    worker.group.all_reduce(sums)
    return metrics_from_sums(sums.tolist(), dataset)


def metrics_from_sums(sums: list[float], dataset: Dataset) -> dict[str, float]:
    """Turn sums over all samples of a dataset, in the order of SUM_COLUMNS, into the metrics of `evaluate`."""
    samples, top1, top5, loss, bad = sums
    assert samples == dataset.samples, f"{samples} of {dataset.samples} samples were evaluated"
    return {
        "val_top1": 100 * top1 / samples,
        "val_top5": 100 * top5 / samples,
        "val_loss": loss / samples,
        "val_bad": bad,
    }


def centred_batches(
    dataset: Dataset, decoder: Decoder, crop: float, batch: int, ids: Ints
) -> Iterator[Batch]:
    """Yield samples `ids` (int[n]) in order, in batches of centre crops, decoded ahead in threads."""
    parts = [ids[i : i + batch] for i in range(0, len(ids), batch)]

    def load(part: Ints) -> Batch:
        return centred_batch(dataset, decoder, part, crop)

    return map_ahead(load, parts, PREFETCH, cost=lambda _: 1, max_cost=PREFETCH)


@torch.no_grad()
def sum_metrics(
    logits: Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    decoder: Decoder,
    crop: float,
    batch: int,
    ids: Ints,
    device: torch.device,
) -> torch.Tensor:
    """Sum the metrics over samples `ids` (int[n]); the other arguments are those of `evaluate`.

    Returns float64[5] on the device, in the order of SUM_COLUMNS.
    """
    sums = torch.zeros(len(SUM_COLUMNS), dtype=torch.float64, device=device)
    for loaded in centred_batches(dataset, decoder, crop, batch, ids):
        check_labels(loaded.labels)
        labels, weights = loaded.labels.to(device), loaded.weights.to(device)
        scores = logits(loaded.images.to(device)).double()
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        hits = (best == labels[:, None]) & (weights > 0)[:, None]
        losses = F.cross_entropy(scores, labels, reduction="none")
        losses = torch.where(weights > 0, losses, float(np.log(scores.shape[1])))
        sums += torch.stack(
            [
                torch.tensor(len(labels), dtype=torch.float64, device=device),
                hits[:, 0].sum().double(),
                hits.any(dim=1).sum().double(),
                losses.sum(),
                (weights == 0).sum().double(),
            ]
        )
    return sums


def check_labels(labels: torch.Tensor) -> None:
    """Raise UserError if a sample has no label. Labels of a batch, on the CPU: reading from a device would wait for it."""
    if has_unlabelled(labels):
        raise UserError(
            "the dataset has samples without a label: `maestream shards view SRC DEST --where 'label is not null'` makes one "
            "without them"
        )


def has_unlabelled(labels: torch.Tensor) -> bool:
    """Whether a sample has no label, or one that is not finite. Labels of a batch, on the CPU."""
    return bool((~labels.isfinite() if labels.is_floating_point() else labels == NO_LABEL).any())
