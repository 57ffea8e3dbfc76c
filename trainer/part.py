"""What a task is given to ask a model about. Without torch, which takes seconds to import: a command that is refused should
be so at once."""

from dataclasses import dataclass
from typing import Literal

FEATURES = "features.json"  # what the features of a folder are
Pool = Literal["class", "mean", "patches"]


@dataclass(frozen=True)
class Part:
    """Some samples of a dataset, and whom to ask about them: what a task is given."""

    run: str
    step: int | None  # of the run's commit; None where `run` is a model's folder, and no run
    data: str
    first: int
    last: int  # the first that is not in it any more
    crop: float  # side of the centred square over the shorter side
    batch: int
    pool: Pool = "class"
    size: tuple[int, int] | None = None  # of images, where it is not that of training
    out: str = ""  # the folder for features
