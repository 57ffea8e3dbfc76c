"""The input of all loaders in `benchmarks.peers`: the same JPEGs as files and as shards, and the same crops.

    FOLDER/images/0007/0002.jpg   one folder per image, with one file per copy
    FOLDER/shards/                the same images, built by `pipeline.build.build`
    FOLDER/plan.npz               key, crop boxes and flips of each sample id

This module imports nothing but numpy, because the peers' environments have little more.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

SEED = 0
SIZE = 224  # height and width of the crops, pixels
PASSES = (
    3  # over the images: warm-up, measurement, and one more so that no loader runs out of data while measured
)


@dataclass(frozen=True)
class Plan:
    """N samples; a sample's id is its position in the manifest's order."""

    folder: Path
    keys: npt.NDArray[np.str_]  # [N]
    boxes: npt.NDArray[np.int64]  # [PASSES, N, 4]: (y, x, height, width) in stored pixels
    flips: npt.NDArray[np.bool_]  # [PASSES, N]

    @property
    def samples(self) -> int:
        return len(self.keys)

    def file(self, sample_id: int) -> str:
        return f"{self.folder}/images/{self.keys[sample_id]}.jpg"

    @property
    def shards(self) -> list[str]:
        return sorted(str(path) for path in (self.folder / "shards").glob("*.tar"))

    def visits(self) -> list[tuple[int, int]]:
        """(pass, sample id) for PASSES passes, each in a random order of its own, as from a RandomSampler."""
        shuffled = np.random.default_rng(SEED)
        return [(p, int(i)) for p in range(PASSES) for i in shuffled.permutation(self.samples)]


def save_plan(plan: Plan) -> None:
    np.savez(plan.folder / "plan.npz", keys=plan.keys, boxes=plan.boxes, flips=plan.flips)


def load_plan(folder: Path) -> Plan:
    with np.load(folder / "plan.npz") as saved:
        return Plan(folder, saved["keys"], saved["boxes"], saved["flips"])
