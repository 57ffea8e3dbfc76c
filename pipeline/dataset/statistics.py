"""Mean and standard deviation of a dataset's pixels: the file beside the manifest that `maestream shards statistics` writes.

The fingerprint of the dataset is in the file. A file of another dataset, left by a build that replaced it, is not used; the
file has no part in the fingerprint.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError

STATISTICS = "statistics.json"
MAX_SHOWN = 4  # channels whose values are printed on one line
SCALES = {"uint8": 255, "uint16": 65535, "float32": 1}  # pixels are divided by it


class Statistics(BaseModel):
    """Mean and standard deviation of each channel over all pixels of the images.

    Units: uint8 is divided by 255, uint16 by 65535, and floats are as they are. The standard deviation is that of the
    population: the root of the mean squared distance from the mean.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    fingerprint: str  # of the dataset
    dtype: Literal["uint8", "uint16", "float32"]  # of the pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # Mean and standard deviation of the images converted to grey; None unless they have 3 channels.
    grey: tuple[float, float] | None
    images: int  # that were read
    pixels: int  # of these images
    samples: int | None  # size of the random sample; None: all images
    seed: int | None  # of the random sample

    @property
    def source(self) -> str:
        """What was read, for messages: "all 512 images"."""
        return (
            f"all {self.images:,} images" if self.samples is None else f"a sample of {self.images:,} images"
        )


def format_values(values: tuple[float, ...]) -> str:
    """Write the values of the first MAX_SHOWN channels: "0.485 0.456 0.406"."""
    text = " ".join(f"{value:.4g}" for value in values[:MAX_SHOWN])
    return text + (f" … ({len(values)} channels)" if len(values) > MAX_SHOWN else "")


def write_statistics(dataset: Dataset, statistics: Statistics) -> None:
    """Write the file, beside the manifest."""
    dataset.store.write(STATISTICS, (statistics.model_dump_json(indent=2) + "\n").encode())


def read_statistics(dataset: Dataset) -> Statistics:
    """Read the statistics of a dataset. UserError if they are missing, damaged, or of another dataset."""
    remedy = f"run `maestream shards statistics {dataset.store.url}`"
    try:
        found = Statistics.model_validate_json(dataset.store.read(STATISTICS))
    except FileNotFoundError:
        raise UserError(
            f"{dataset.store.url} has no mean and standard deviation of its pixels: {remedy}"
        ) from None
    except (ValidationError, ValueError):
        raise UserError(f"{dataset.store.describe(STATISTICS)} is damaged: {remedy}") from None
    if found.fingerprint != dataset.fingerprint:
        raise UserError(
            f"{dataset.store.describe(STATISTICS)} is of another dataset, which was there before: {remedy}"
        )
    return found
