"""Apply a saved model to one part of a dataset: predictions and their accuracy, or features. Ray tasks call these functions."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import LabelKind
from pipeline.decode.decoder import Decoder, Size
from pipeline.decode.factory import make_decoder
from pipeline.images.pixels import Pixels
from pipeline.storage.faults import as_user_error
from pipeline.storage.parquet import to_parquet
from pipeline.storage.store import open_shared
from trainer.config.device import best_device, with_autocast
from trainer.config.model_schema import ClassifierConfig, EncoderConfig
from trainer.config.schema import LinprobeConfig
from trainer.evaluate.accuracy import centred_batches, sum_metrics
from trainer.evaluate.inference_shard import FEATURES, InferenceShard, Pool
from trainer.evaluate.predictions import Predictions, predict
from trainer.models.classifier import Classifier
from trainer.models.pixels import images_taken
from trainer.weights.api import load_probe
from trainer.weights.pretrained import (
    ModelInfo,
    build_pretrained,
    encoder_only,
    read_model_info,
    read_pretrained,
)
from trainer.weights.resize import resize_model


class LoadedModel(NamedTuple):
    """A model on its device."""

    forward: Callable[[torch.Tensor], torch.Tensor]  # applied to pixels [n, c, h, w] on the device
    model: EncoderConfig
    device: torch.device


@functools.lru_cache(maxsize=2)  # a Ray task's process gets many parts of the same dataset
def _load_with_head(run: str, step: int | None) -> LoadedModel:
    """Load a fine-tuned model or a linear probe; its forward function returns logits, or numbers in original units, [n, k]."""
    info = read_model_info(run, step, already_reached=True)
    if isinstance(info.run, LinprobeConfig):
        return _on_device(load_probe(info).to(best_device()), info)
    classifier = build_pretrained(read_pretrained(run, step, already_reached=True))
    assert isinstance(classifier, Classifier)
    return _on_device(classifier.to(best_device()), info)


@functools.lru_cache(maxsize=2)
def _load_features(run: str, step: int | None, pool: Pool, size: Size | None) -> LoadedModel:
    """Load a model whose forward function returns features.

    These are the input of a classifier's head, or an encoder's tokens by `pool`: [n, width], or [n, rows, columns, width] for
    all patches.
    """
    pretrained = read_pretrained(run, step, already_reached=True)
    if size:
        pretrained = resize_model(pretrained, size)
    if not isinstance(pretrained.model, ClassifierConfig):
        pretrained = encoder_only(pretrained)
    model = build_pretrained(pretrained).to(best_device())
    if isinstance(model, Classifier):
        return _on_device(model.features, pretrained.info)

    def forward(images: torch.Tensor) -> torch.Tensor:
        tokens = model(images)
        if pool == "patches":
            return tokens[:, 1:].unflatten(1, model.grid)
        return tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(dim=1)

    return _on_device(forward, pretrained.info)


def _on_device(forward: Callable[[torch.Tensor], torch.Tensor], info: ModelInfo) -> LoadedModel:
    device = best_device()
    return LoadedModel(with_autocast(forward, info, device), info.model, device)


@functools.lru_cache(maxsize=2)
def _make_decoder(size: Size, pixels: Pixels) -> Decoder:
    return make_decoder("auto", size, torch.get_num_threads(), best_device(), pixels)


def _open(url: str, model: EncoderConfig) -> tuple[Dataset, Decoder]:
    """Open a dataset, and return it with a decoder of its images for a model."""
    dataset = open_dataset(url, already_reached=True)
    return dataset, _make_decoder(model.size, images_taken(model, dataset.manifest.pixels))


def evaluate_shard(shard: InferenceShard) -> list[float]:
    """Sum the metrics over the samples of a shard, in the order of `trainer.evaluate.accuracy.SUM_COLUMNS`."""
    forward, model, device = _load_with_head(shard.run, shard.step)
    dataset, decoder = _open(shard.data, model)
    ids = np.arange(shard.first, shard.last)
    return sum_metrics(forward, dataset, decoder, shard.crop, shard.batch, ids, device).tolist()


def predict_shard(shard: InferenceShard) -> tuple[InferenceShard, Predictions]:
    """Predict the samples of a shard with a model for several classes or numbers."""
    forward, model, device = _load_with_head(shard.run, shard.step)
    dataset, decoder = _open(shard.data, model)
    ids = np.arange(shard.first, shard.last)
    return shard, predict(forward, dataset, decoder, shard.crop, shard.batch, ids, device)


@torch.no_grad()
def extract_features(shard: InferenceShard) -> tuple[InferenceShard, pa.Table]:
    """Compute the features of a shard's samples.

    Returns the shard, and a table with a row for each sample that can be read: sample (id), key, label (see `label_column`),
    and feature, float32, flattened. The feature's shape is in the schema's metadata: [width], or [rows, columns, width] for all patches.
    """
    forward, model, device = _load_features(shard.run, shard.step, shard.pool, shard.size)
    dataset, decoder = _open(shard.data, model)
    tables = []
    ids = np.arange(shard.first, shard.last)
    for batch in centred_batches(dataset, decoder, shard.crop, shard.batch, ids):
        good = batch.weights > 0
        features = forward(batch.images.to(device)).float().cpu().numpy()
        shape, features = features.shape[1:], features[good].reshape(int(good.sum()), -1)
        good_ids = batch.sample_ids[good].numpy()
        flat = pa.array(features.ravel(), pa.float32())
        tables.append(
            pa.table(
                {
                    "sample": good_ids,
                    "key": dataset.keys(good_ids),
                    "label": label_column(batch.labels[good], dataset.manifest.labels),
                    "feature": pa.FixedSizeListArray.from_arrays(flat, features.shape[1]),
                }
            )
        )
    return shard, pa.concat_tables(tables).replace_schema_metadata({"shape": str(list(shape))})


def label_column(labels: torch.Tensor, kind: LabelKind) -> pa.Array:
    """Return labels of a batch as a column: int64, NO_LABEL for none; or lists, null for none.

    Lists have the numbers of several classes, int32, or numbers, float32.
    """
    if kind == "class":
        return pa.array(labels.numpy())
    known = ~labels.isnan().any(dim=1)
    rows = (labels > 0) if kind == "classes" else labels
    lists = [
        None if not has else row.nonzero()[:, 0].tolist() if kind == "classes" else row.tolist()
        for row, has in zip(rows, known.tolist(), strict=True)
    ]
    return pa.array(lists, pa.list_(pa.int32() if kind == "classes" else pa.float32()))


def labels_from_column(column: pa.ChunkedArray, kind: LabelKind, classes: int) -> torch.Tensor:
    """Return the labels of `label_column` as in a batch. `classes` is the number of classes, or of numbers per label."""
    if kind == "class":
        return torch.from_numpy(column.to_numpy().astype(np.int64))
    lists = column.to_pylist()
    labels = torch.zeros(len(lists), classes)
    for target, row in zip(labels, lists, strict=True):
        if row is None:
            target.fill_(float("nan"))
        elif kind == "classes":
            target[row] = 1
        else:
            target.copy_(torch.tensor(row))
    return labels


def write_features(shard: InferenceShard) -> tuple[InferenceShard, int]:
    """Write the features of a shard to a file of their own, unless that exists.

    Returns the shard, and the number of its samples that can be read.
    """
    store = open_shared(shard.out, FEATURES)
    name = f"part-{shard.first:010d}.parquet"
    if store.exists(name):
        with as_user_error(store.describe(name)), store.fs.open(store.path(name)) as file:
            return shard, pq.read_metadata(file).num_rows
    table = extract_features(shard)[1]
    store.write(name, to_parquet(table))
    return shard, len(table)
