"""Work item of `maestream evaluate`, `features` and `knn`.

This module does not import torch, so that the command line can refuse a wrong option at once.
"""

from dataclasses import dataclass
from typing import Literal

FEATURES = "features.json"  # describes the features in a folder
Pool = Literal["class", "mean", "patches"]


@dataclass(frozen=True)
class InferenceShard:
    """A range of a dataset's samples, and the model to apply to them."""

    run: str  # folder of a run or a model
    step: int | None  # step of the run's checkpoint; None for a model folder
    data: str
    first: int  # sample ids from first up to, not including, last
    last: int
    crop: float  # side of the centre crop, divided by the image's shorter side
    batch: int
    pool: Pool = "class"
    size: tuple[int, int] | None = None  # height and width of images in pixels, if not that of training
    out: str = ""  # folder for features
