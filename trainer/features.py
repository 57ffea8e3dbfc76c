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
from pipeline.storage import explained, open_shared
from trainer.checkpoint import read_weights
from trainer.classifier import Classifier, Encoder
from trainer.config import ClassifierConfig, LinprobeConfig
from trainer.device import best_device, in_precision
from trainer.evaluate import centred_batches, tally
from trainer.linprobe import Probe
from trainer.part import FEATURES, Part, Pool
from trainer.pretrained import About, Pretrained, describe, encoder_alone, read_pretrained, resized


class Model(NamedTuple):
    """Of a commit."""

    says: Callable[[torch.Tensor], torch.Tensor]  # of uint8[n, 3, h, w] on the device
    decoder: Decoder
    device: torch.device


@functools.lru_cache(maxsize=2)  # a task's process has many parts to do
def _answering(run: str, step: int | None) -> Model:
    """The logits of a classifier."""
    about = describe(run, step, known=True)
    if isinstance(about.run, LinprobeConfig):
        assert about.store is not None
        assert about.step is not None
        weights = read_weights(about.store, about.step)
        probe = Probe(about.run, len(weights["linear.weight"]))
        probe.load_state_dict(weights)
        return _on_device(probe.to(best_device()), about)
    return _on_device(_classifier(read_pretrained(run, step, known=True)), about)


def _classifier(found: Pretrained) -> Classifier:
    """A classifier on the device."""
    assert isinstance(found.model, ClassifierConfig)
    model = Classifier(found.model, len(found.weights["head.weight"]))
    model.load_state_dict(found.weights)
    return model.to(best_device())


@functools.lru_cache(maxsize=2)
def _describing(run: str, step: int | None, pool: Pool, size: Size | None) -> Model:
    """The features of an encoder: of a fine-tuned one what its head reads, else by `pool`."""
    found = read_pretrained(run, step, known=True)
    if size:
        found = resized(found, size)
    if isinstance(found.model, ClassifierConfig):
        return _on_device(_classifier(found).features, found.about)
    found = encoder_alone(found)
    encoder = Encoder(found.model)
    encoder.load_state_dict(found.weights)
    encoder.to(best_device())

    def says(images: torch.Tensor) -> torch.Tensor:
        tokens = encoder(images)
        if pool == "patches":
            return tokens[:, 1:].unflatten(1, encoder.grid)
        return tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(dim=1)

    return _on_device(says, found.about)


def _on_device(says: Callable[[torch.Tensor], torch.Tensor], about: About) -> Model:
    device = best_device()
    decoder = make_decoder("auto", about.model.size, torch.get_num_threads(), device)
    return Model(in_precision(says, about, device), decoder, device)


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
