"""What a dataset was before it was extended: its first shards."""

import hashlib
import json

import pyarrow as pa

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import Part


def find_prefix(dataset: Dataset, fingerprint: str) -> int | None:
    """The number of first shards that are the dataset with this fingerprint; None if there is none.

    The same hash as `pipeline.dataset.manifest.fingerprint`, for all prefixes at once.
    """
    digest = hashlib.sha256()
    for nth, content in enumerate(dataset.shard_content.to_pylist()):
        digest.update((f"\n{content}" if nth else content).encode())
        found = digest.copy()
        if dataset.manifest.weighted:
            parts = first_parts(dataset, nth + 1)
            if any(part.times != 1 for part in parts):
                found.update(json.dumps([[part.shards, str(part.times)] for part in parts]).encode())
        if found.hexdigest() == fingerprint:
            return nth + 1
    return None


def first_parts(dataset: Dataset, shards: int) -> tuple[Part, ...]:
    """The parts of the first shards of a dataset with parts."""
    parts: list[Part] = []
    for part in dataset.manifest.parts:
        left = shards - sum(p.shards for p in parts)
        if left > 0:
            parts.append(part.model_copy(update={"shards": min(left, part.shards)}))
    return tuple(parts)


def first_shards(dataset: Dataset, shards: int, fingerprint: str) -> Dataset:
    """The first shards of a dataset, as a dataset with this fingerprint."""
    samples = int(dataset.shard_samples[:shards].sum())
    manifest = dataset.manifest.model_copy(
        update={
            "fingerprint": fingerprint,
            "samples": samples,
            "shards": shards,
            # Not known exactly; it is only for the memory of reading ahead.
            "image_bytes": round(dataset.mean_sample_bytes * samples),
            "parts": first_parts(dataset, shards),
        }
    )
    table = pa.table(
        {
            "name": dataset.shard_names.slice(0, shards),
            "samples": dataset.shard_samples[:shards],
            "bytes": dataset.shard_bytes[:shards],
        }
    )
    identity = hashlib.sha256(f"{dataset.identity} {shards}".encode()).hexdigest()
    return Dataset(dataset.store, dataset.shard_store, manifest, table, identity)
