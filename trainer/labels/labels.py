"""What a run learns to predict: one class, several classes or numbers.

RUN/labels.json says it for runs whose labels are not one class. For numbers it has their mean and standard deviation over the
training dataset: a model is trained on (number − mean) / deviation, and all its predictions are given in the original units.
"""

import functools
import itertools
import json
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import LabelKind
from pipeline.errors import UserError
from pipeline.storage.store import Store

LABELS = "labels.json"
KIND_NAMES: dict[LabelKind, str] = {
    "class": "one class per image",
    "classes": "several classes per image",
    "numbers": "numbers",
}
NOUNS: dict[LabelKind, str] = {"class": "classes", "classes": "classes", "numbers": "numbers per image"}
REMEDY = "`maestream shards view SRC DEST --where 'label is not null'` makes a dataset without such samples"


class Labels(BaseModel):
    """What the labels of a training dataset are, and so what a head predicts."""

    model_config = ConfigDict(frozen=True)

    kind: LabelKind
    outputs: int  # size of the head: number of classes, or of numbers per image
    mean: tuple[float, ...] = ()  # of each number over the training dataset; empty for classes
    deviation: tuple[float, ...] = ()  # standard deviation of each number; 1 if the number is constant

    def standardise(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return (number − mean) / deviation, float64[n, k], of float[n, k]."""
        mean, deviation = _scales(self, numbers.device)
        return (numbers.double() - mean) / deviation

    def in_units(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return outputs of a head in training, float[n, k], in original units. Those for classes stay as they are."""
        if self.kind != "numbers":
            return outputs
        mean, deviation = _scales(self, outputs.device)
        return (outputs.double() * deviation + mean).to(outputs.dtype)

    def head_in_units(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight [k, width] and bias [k] of the head that predicts in original units. Those for classes stay."""
        if self.kind != "numbers":
            return weight, bias
        mean, deviation = _scales(self, bias.device)
        return (
            (weight.double() * deviation[:, None]).to(weight.dtype),
            (bias.double() * deviation + mean).to(bias.dtype),
        )


@functools.lru_cache(maxsize=4)  # a copy to a GPU in each step would wait for it
def _scales(labels: Labels, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation of numbers, float64[k] on a device."""
    return (
        torch.tensor(labels.mean, dtype=torch.float64, device=device),
        torch.tensor(labels.deviation, dtype=torch.float64, device=device),
    )


# ---- of a dataset


def unmeasured_labels(dataset: Dataset) -> Labels:
    """Return what labels are, without mean and deviation of numbers. UserError if there are no labels."""
    manifest = dataset.manifest
    if not manifest.classes:
        raise UserError(f"{dataset.store.url} has no labels: build it from class folders")
    return Labels(kind=manifest.labels, outputs=len(manifest.classes))


@functools.lru_cache(maxsize=1)  # a command asks more than once for the same opened dataset
def measure_labels(dataset: Dataset) -> Labels:
    """Return what the labels of a training dataset are. For numbers this reads all indexes.

    Raises UserError if there are no labels or, for numbers, if one is missing or not finite, or all are equal.
    """
    labels = unmeasured_labels(dataset)
    if labels.kind != "numbers":
        return labels
    count, mean = 0, np.zeros(labels.outputs)
    squares = np.zeros_like(mean)  # sums of squared differences from the mean
    for numbers in known_labels(dataset):
        values, total = numbers.astype(np.float64), count + len(numbers)
        shift = values.mean(axis=0) - mean
        squares = squares + values.var(axis=0) * len(values) + shift**2 * count * len(values) / total
        mean, count = mean + shift * len(values) / total, total
    deviation = np.sqrt(squares / max(count, 1))
    if not deviation.any():
        raise UserError(f"{dataset.store.url}: all images have the same label, so there is nothing to learn")
    deviation[deviation == 0] = 1.0
    return Labels(kind="numbers", outputs=len(mean), mean=tuple(mean), deviation=tuple(deviation))


def known_labels(dataset: Dataset) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the labels of each shard that has samples, float32[n, k] as in batches.

    For several classes and numbers. Raises UserError if a label is missing or not finite.
    """
    starts = dataset.shard_starts.tolist()
    for first, last in itertools.pairwise(starts):
        if first == last:
            continue
        labels = dataset.labels(dataset.locate(np.arange(first, last)).row)
        if (wrong := np.flatnonzero(~np.isfinite(labels).all(axis=1))).size:
            (key,) = dataset.keys([first + int(wrong[0])])
            if np.isinf(labels[wrong[0]]).any():
                raise UserError(f"{dataset.store.url}: the label of sample {key} is not finite: correct it")
            raise UserError(f"{dataset.store.url}: sample {key} has no label: {REMEDY}")
        yield labels


def check_same_labels(dataset: Dataset, val: Dataset) -> None:
    """Raise UserError unless the labels of both datasets are of the same kind, with the same classes in the same order."""
    ours, theirs = dataset.manifest, val.manifest
    if theirs.labels != ours.labels:
        raise UserError(
            f"{val.store.url} and {dataset.store.url} have different kinds of labels ({KIND_NAMES[theirs.labels]}, and "
            f"{KIND_NAMES[ours.labels]})"
        )
    if theirs.classes != ours.classes:
        raise UserError(
            f"{val.store.url} and {dataset.store.url} have different {NOUNS[ours.labels]} ({len(theirs.classes):,} and "
            f"{len(ours.classes):,}): two views of one dataset (`maestream shards view`) have the same"
        )


def check_evaluable(val: Dataset, labels: Labels) -> None:
    """Raise UserError if a validation dataset cannot be evaluated.

    That is if a label is missing or not finite, or if no sample has any of several classes. It reads all indexes, except for
    one class per image, whose labels are checked with each batch.
    """
    if labels.kind == "class":
        return
    positive = False
    for values in known_labels(val):
        positive = positive or bool((values > 0).any())
    if labels.kind == "classes" and not positive:
        raise UserError(f"{val.store.url}: no image has any class, so mAP is not defined")


def check_val(dataset: Dataset, val: Dataset | None) -> None:
    """Raise UserError if a validation dataset has another kind of labels than the training dataset, other classes, or labels
    that cannot be evaluated; or if the training dataset has no labels."""
    labels = unmeasured_labels(dataset)
    if val is not None:
        check_same_labels(dataset, val)
        check_evaluable(val, labels)


# ---- of a run


def write_labels(store: Store, labels: Labels) -> None:
    """Write RUN/labels.json, unless labels are one class: then remove one that an interrupted first start has left."""
    if labels.kind != "class":
        store.write(LABELS, (labels.model_dump_json(indent=1) + "\n").encode())
    elif store.exists(LABELS):
        store.remove([LABELS])


def read_labels(store: Store) -> Labels | None:
    """Read RUN/labels.json; None if there is none, because labels are one class. UserError if it is damaged."""
    try:
        return Labels.model_validate(json.loads(store.read(LABELS)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{store.describe(LABELS)} is damaged ({first}): choose another --out") from None


def labels_of_run(store: Store, dataset: Dataset) -> Labels:
    """Return the labels of a run that was created with this training dataset. UserError if the dataset has none."""
    if dataset.manifest.labels == "class":
        return measure_labels(dataset)
    labels = read_labels(store)
    if labels is None:
        raise UserError(f"{store.describe(LABELS)} is missing: choose another --out")
    return labels
