"""Evaluation of models for several classes or numbers: every readable sample counts exactly once, at any world size.

mAP depends on all scores of a class at once. So each worker keeps the outputs of its samples in memory, and rank 0 gets those
of all workers for COLUMNS classes at a time. That is 8 bytes per sample and class, divided by the number of workers, and on
rank 0 about 32 · COLUMNS bytes per sample besides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.arrays import Ints
from pipeline.dataset.dataset import Dataset
from pipeline.decode.decoder import Decoder
from pipeline.errors import UserError
from trainer.evaluate.accuracy import centred_batches, check_labels
from trainer.evaluate.accuracy import evaluate as evaluate_classes
from trainer.labels.labels import Labels
from trainer.labels.scores import average_precision, mean_of_known, r2
from trainer.run.worker import Worker

COLUMNS = 64  # classes or numbers that are gathered at a time
SCORES = {"classes": ("map", "loss"), "numbers": ("r2", "mae", "loss")}


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for samples, in the order of their ids, and their labels. On the CPU."""

    outputs: torch.Tensor  # float[n, k]: logits of classes, or numbers in original units
    labels: torch.Tensor  # float32[n, k]: 0 or 1 for each class, or numbers
    readable: torch.Tensor  # bool[n]


def evaluate(
    outputs: Callable[[torch.Tensor], torch.Tensor],
    labels: Labels,
    dataset: Dataset,
    decoder: Decoder,
    crop: float,
    batch: int,
    worker: Worker,
) -> dict[str, float]:
    """Evaluate a model on all samples of a dataset. Every rank must call this; all get the same result.

    Args:
        outputs: maps uint8[n, 3, h, w] → logits, or numbers in original units, float[n, k] on the worker's device.
        labels: what the model was trained on.
        crop, batch: see `trainer.evaluate.accuracy.evaluate`.

    Returns the metrics of that function for one class per image; `val_map` in percent and `val_loss` for several classes;
    `val_r2`, `val_mae` in original units and `val_loss`, the mean squared error of standardised numbers, for numbers; and
    `val_bad`, the number of unreadable samples, which the others leave out.
    Raises UserError if a sample has no label, if no sample can be read, or if the outputs are not finite.
    """
    if labels.kind == "class":
        return evaluate_classes(outputs, dataset, decoder, crop, batch, worker)
    ids = np.array_split(np.arange(dataset.samples), worker.world_size)
    own = predict(outputs, dataset, decoder, crop, batch, ids[worker.rank], worker.device, labels.outputs)
    return score(own, labels, dataset, worker)


@torch.no_grad()
def predict(
    outputs: Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    decoder: Decoder,
    crop: float,
    batch: int,
    ids: Ints,
    device: torch.device,
    width: int = 0,
) -> Predictions:
    """Predict samples `ids` (int[n]); the other arguments are those of `evaluate`.

    Args:
        width: number of outputs of each sample; only needed if there may be no samples.
    """
    parts = []
    if not len(ids):  # of a rank with no samples
        empty = torch.zeros(0, width)
        parts.append(Predictions(empty, empty, torch.zeros(0, dtype=torch.bool)))
    for loaded in centred_batches(dataset, decoder, crop, batch, ids):
        check_labels(loaded.labels)
        predicted = outputs(loaded.images.to(device)).cpu()
        parts.append(Predictions(predicted, loaded.labels, loaded.weights > 0))
    return join(parts)


def join(parts: Sequence[Predictions]) -> Predictions:
    """Join predictions of consecutive samples."""
    return Predictions(
        torch.cat([part.outputs for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.readable for part in parts]),
    )


def score(own: Predictions, labels: Labels, dataset: Dataset, worker: Worker) -> dict[str, float]:
    """Compute the metrics of `evaluate` from the predictions of each worker, rank after rank. Call it on every rank."""
    names = SCORES[labels.kind]
    readable = gather(own.readable[:, None], worker)
    columns: list[dict[str, float]] = []
    for first in range(0, labels.outputs, COLUMNS):
        block = slice(first, first + COLUMNS)
        outputs, targets = gather(own.outputs[:, block], worker), gather(own.labels[:, block], worker)
        if worker.rank == 0:
            good = readable[:, 0] > 0
            columns += score_columns(outputs[good], targets[good], labels, first)
    result = torch.zeros(len(names) + 2, dtype=torch.float64, device=worker.device)
    if worker.rank == 0:
        of_columns = [[column[name] for column in columns] for name in names]
        means = [
            mean_of_known(values) if name == "map" else float(np.mean(values))
            for name, values in zip(names, of_columns, strict=True)
        ]
        counts = [float((readable == 0).sum()), float((readable > 0).sum())]
        result += torch.tensor([*means, *counts], dtype=torch.float64, device=worker.device)
    worker.group.broadcast(result, source=0)
    *values, bad, good_samples = result.tolist()
    found = dict(zip(names, values, strict=True))
    where = dataset.store.url
    assert bad + good_samples == dataset.samples, f"{bad + good_samples} of {dataset.samples} were evaluated"
    if not good_samples:
        raise UserError(f"{where}: no image can be read, so there is nothing to evaluate")
    if not np.isfinite(found["loss"]):
        raise UserError(f"the model's outputs for {where} are not finite: use an earlier checkpoint")
    if np.isnan(found.get("map", 0.0)):
        raise UserError(f"{where}: no image has any class, so mAP is not defined")
    return {f"val_{name}": value for name, value in found.items()} | {"val_bad": bad}


def score_columns(
    outputs: torch.Tensor, targets: torch.Tensor, labels: Labels, first: int
) -> list[dict[str, float]]:
    """Score each class or number on its own.

    Args:
        outputs, targets: float64[n, columns] of the readable samples.
        first: number of the first column among all.

    Returns a dictionary with SCORES for each column; "map" is NaN for a class without a positive sample.
    """
    if not len(outputs):
        return [dict.fromkeys(SCORES[labels.kind], float("nan")) for _ in range(targets.shape[1])]
    if labels.kind == "classes":
        losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=0)
        predicted, actual = outputs.numpy(), targets.numpy()
        return [
            {"map": 100 * average_precision(predicted[:, i], actual[:, i]), "loss": float(losses[i])}
            for i in range(actual.shape[1])
        ]
    predicted, actual = outputs.numpy(), targets.numpy()
    found = []
    for i in range(actual.shape[1]):
        error = actual[:, i] - predicted[:, i]
        loss = np.mean(np.square(error / labels.deviation[first + i]))
        mae = np.mean(np.abs(error))
        found.append({"r2": r2(predicted[:, i], actual[:, i]), "mae": float(mae), "loss": float(loss)})
    return found


def gather(own: torch.Tensor, worker: Worker) -> torch.Tensor:
    """Return the rows [n, k] of all ranks as float64, rank after rank, on the CPU of rank 0; other ranks get no rows.

    Ranks may have different numbers of rows. Call it on every rank.
    """
    own = own.double()  # ranks without samples have no other dtype
    if worker.world_size == 1:
        return own
    counts = torch.zeros(worker.world_size, dtype=torch.int64, device=worker.device)
    counts[worker.rank] = len(own)
    worker.group.all_reduce(counts)
    longest = int(counts.max())
    padded = F.pad(own, (0, 0, 0, longest - len(own))).contiguous().to(worker.device)
    parts = worker.group.gather(padded)
    if parts is None:
        return own[:0]
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)]).cpu()
