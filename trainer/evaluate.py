"""How often a classifier is right: every sample of a dataset exactly once, at any world size."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.ahead import map_ahead
from pipeline.decode import Decoder
from pipeline.errors import UserError
from pipeline.loader import Batch, centred_batch
from pipeline.manifest import NO_LABEL, Dataset
from pipeline.order import Ints
from trainer.run import Run

AHEAD = 2  # batches made ahead, at most
COLUMNS = ("samples", "top1", "top5", "loss", "bad")


def evaluate(
    logits: Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    decoder: Decoder,
    crop: float,
    batch: int,
    run: Run,
) -> dict[str, float]:
    """Top-1 and top-5 in percent, and the mean loss, over all samples of a dataset. Call it on every rank; all get the same.

    A sample that cannot be read counts as wrong, with the loss of knowing nothing, and is counted in `val_bad`.

    Args:
        logits: gives float[n, classes] of uint8[n, 3, size, size] on the run's device.
        crop: side of the centred square over the shorter side.
        batch: samples at once.
    """
    ids = np.array_split(np.arange(dataset.samples), run.world_size)[run.rank]
    sums = tally(logits, dataset, decoder, crop, batch, ids, run.device)
    if run.world_size > 1:
        dist.all_reduce(sums)
    return described(sums.tolist(), dataset)


def described(sums: list[float], dataset: Dataset) -> dict[str, float]:
    """What sums by COLUMNS over all samples of a dataset come to."""
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
    """Samples `ids` (int[n]) in batches, through centre crops, made ahead."""
    parts = [ids[i : i + batch] for i in range(0, len(ids), batch)]

    def load(part: Ints) -> Batch:
        return centred_batch(dataset, decoder, part, crop)

    return map_ahead(load, parts, AHEAD, cost=lambda _: 1, most=AHEAD)


@torch.no_grad()
def tally(
    logits: Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    decoder: Decoder,
    crop: float,
    batch: int,
    ids: Ints,
    device: torch.device,
) -> torch.Tensor:
    """Sums over samples `ids` (int[n]), by COLUMNS: float64[5] on the device."""
    sums = torch.zeros(len(COLUMNS), dtype=torch.float64, device=device)
    for loaded in centred_batches(dataset, decoder, crop, batch, ids):
        check_labels(loaded.labels)
        labels, weights = loaded.labels.to(device), loaded.weights.to(device)
        scores = logits(loaded.images.to(device)).double()
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        right = (best == labels[:, None]) & (weights > 0)[:, None]
        losses = F.cross_entropy(scores, labels, reduction="none")
        losses = torch.where(weights > 0, losses, float(np.log(scores.shape[1])))
        sums += torch.stack(
            [
                torch.tensor(len(labels), dtype=torch.float64, device=device),
                right[:, 0].sum().double(),
                right.any(dim=1).sum().double(),
                losses.sum(),
                (weights == 0).sum().double(),
            ]
        )
    return sums


def check_labels(labels: torch.Tensor) -> None:
    """UserError where a sample has none. int[n], on the host: a device must not be asked."""
    if (labels == NO_LABEL).any():
        raise UserError(
            "the dataset has samples without a label, which name no class: build or index it without them"
        )


def check_classes(dataset: Dataset, val: Dataset | None) -> int:
    """How many classes there are. UserError where a dataset has no labels, or the two have others."""
    classes = dataset.manifest.classes
    if not classes:
        raise UserError(f"{dataset.store.url} has no labels: build it from class folders")
    if val is not None and val.manifest.classes != classes:
        raise UserError(
            f"{val.store.url} has other classes than {dataset.store.url} ({len(val.manifest.classes)} and {len(classes)})"
        )
    return len(classes)
