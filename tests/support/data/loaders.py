"""Loaders with a small global batch."""

from pipeline.dataset.dataset import Dataset
from pipeline.decode.factory import make_decoder
from pipeline.loading.loader import Loader
from pipeline.loading.order import Order


def make_loader(dataset: Dataset, rank: int = 0, world_size: int = 1, **order: int) -> Loader:
    numbers = {"seed": 0, "global_batch": 12, "lanes": 6, "block": 4} | order
    return Loader(
        dataset, Order(dataset.shard_samples, **numbers), make_decoder("cpu", 32, 2), rank, world_size
    )
