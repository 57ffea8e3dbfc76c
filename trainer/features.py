"""What models of committed checkpoints say of datasets: features, and answers."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.decode import Decoder, Size, make_decoder
from pipeline.manifest import open_dataset
from pipeline.parquet import to_parquet
from pipeline.storage import Store, explained, open_shared, open_store
from trainer.checkpoint import read_state, read_weights
from trainer.classifier import Classifier, Encoder
from trainer.config import FinetuneConfig, InitConfig, LinprobeConfig, RunConfig
from trainer.device import best_device, in_precision
from trainer.evaluate import centred_batches, tally
from trainer.finetune import EMA
from trainer.initial import interpolated, load_encoder
from trainer.linprobe import Probe
from trainer.part import FEATURES, Part, Pool
from trainer.recipe import with_overrides
from trainer.run import read_config


class Model(NamedTuple):
    """Of a commit."""

    says: Callable[[torch.Tensor], torch.Tensor]  # of uint8[n, 3, h, w] on the device
    decoder: Decoder
    device: torch.device


@functools.lru_cache(maxsize=2)  # a task's process has many parts to do
def _answering(run: str, step: int) -> Model:
    """The logits of a classifier."""
    store = open_store(run, known=True)
    config = read_config(store)
    weights = _weights(store, step, config)
    model: Classifier | Probe
    if isinstance(config, FinetuneConfig):
        model = Classifier(config.model, len(weights["head.weight"]))
    else:
        assert isinstance(config, LinprobeConfig)
        model = Probe(config, len(weights["linear.weight"]))
    model.load_state_dict(weights)
    return _on_device(model.to(best_device()), config, config.model.size)


def _weights(store: Store, step: int, config: RunConfig) -> dict[str, torch.Tensor]:
    """Of a commit: the averaged ones, if those are what is evaluated."""
    weights = read_weights(store, step)
    if isinstance(config, FinetuneConfig) and config.optim.ema:
        weights |= read_state(store, step, EMA)
    return weights


@functools.lru_cache(maxsize=2)
def _describing(run: str, step: int, pool: Pool, size: Size | None) -> Model:
    """The features of an encoder: of a fine-tuned one what its head reads, else by `pool`."""
    store = open_store(run, known=True)
    config = read_config(store)
    trained = config.model.grid
    if size:
        config = with_overrides(config, (f"model.image_size={list(size)}",), "--image-size")
    if isinstance(config, FinetuneConfig):
        weights = _weights(store, step, config)
        weights["pos_embed"] = interpolated(weights["pos_embed"], trained, config.model.grid)
        classifier = Classifier(config.model, len(weights["head.weight"]))
        classifier.load_state_dict(weights)
        return _on_device(classifier.to(best_device()).features, config, config.model.size)
    encoder = Encoder(config.model.encoder).to(best_device())
    load_encoder(InitConfig(run=run, step=step), encoder, "norm")

    def says(images: torch.Tensor) -> torch.Tensor:
        tokens = encoder(images)
        if pool == "patches":
            return tokens[:, 1:].unflatten(1, encoder.grid)
        return tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(dim=1)

    return _on_device(says, config, config.model.size)


def _on_device(says: Callable[[torch.Tensor], torch.Tensor], config: RunConfig, size: Size) -> Model:
    device = best_device()
    decoder = make_decoder("auto", size, torch.get_num_threads(), device)
    return Model(in_precision(says, config, device), decoder, device)


def answers_of(part: Part) -> list[float]:
    """Sums over the samples of a part, by `trainer.evaluate.COLUMNS`."""
    says, decoder, device = _answering(part.run, part.step)
    dataset = open_dataset(part.data, known=True)
    ids = np.arange(part.first, part.last)
    return tally(says, dataset, decoder, part.crop, part.batch, ids, device).tolist()


@torch.no_grad()
def features_of(part: Part) -> tuple[Part, pa.Table]:
    """The part, and a row for each of its samples that can be read: id, key, label, and feature, float32, flat; its shape
    is in the schema's metadata: [width], or [rows, columns, width] of all patches."""
    says, decoder, device = _describing(part.run, part.step, part.pool, part.size)
    dataset = open_dataset(part.data, known=True)
    tables = []
    ids = np.arange(part.first, part.last)
    for batch in centred_batches(dataset, decoder, part.crop, part.batch, ids):
        good = batch.weights > 0
        found = says(batch.images.to(device)).float().cpu().numpy()
        shape, found = found.shape[1:], found[good].reshape(int(good.sum()), -1)
        known = batch.sample_ids[good].numpy()
        flat = pa.array(found.ravel(), pa.float32())
        tables.append(
            pa.table(
                {
                    "sample": known,
                    "key": dataset.keys(known),
                    "label": batch.labels[good].numpy(),
                    "feature": pa.FixedSizeListArray.from_arrays(flat, found.shape[1]),
                }
            )
        )
    return part, pa.concat_tables(tables).replace_schema_metadata({"shape": str(list(shape))})


def write_features(part: Part) -> tuple[Part, int]:
    """The part, and how many of its samples can be read: their features are in a file of its own."""
    store = open_shared(part.out, FEATURES)
    name = f"part-{part.first:010d}.parquet"
    if store.exists(name):
        with explained(store.describe(name)), store.fs.open(store.path(name)) as file:
            return part, pq.read_metadata(file).num_rows
    table = features_of(part)[1]
    store.write(name, to_parquet(table))
    return part, len(table)
