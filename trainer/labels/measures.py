"""Names of what models are measured by, and how they are written for people.

A metric's name is "val_" (evaluation on a validation dataset) or "knn_" (nearest neighbours) with a name of MEASURES, in
metrics.jsonl, in TensorBoard and in RUN/evaluations/.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """How a measure is written: its short and its long name, its unit, and the format of its value."""

    label: str
    title: str
    unit: str  # " %" or nothing
    format: str

    @property
    def name(self) -> str:
        """The label with the unit, such as "top-1, %"."""
        return self.label + (f",{self.unit}" if self.unit else "")

    def text(self, value: float) -> str:
        """The value with its unit, such as "71.25 %"."""
        return f"{value:{self.format}}{self.unit}"


MEASURES = {
    "top1": Measure("top-1", "Top-1 accuracy", " %", ".2f"),
    "top5": Measure("top-5", "Top-5 accuracy", " %", ".2f"),
    "map": Measure("mAP", "Mean average precision", " %", ".2f"),
    "r2": Measure("R²", "R²", "", ".4f"),
    "mae": Measure("MAE", "Mean absolute error", "", ".4g"),
    "loss": Measure("loss", "Loss", "", ".4f"),
}
# The measure by which models are compared: of labels that are one class, several classes, or numbers.
MAIN = ("top1", "map", "r2")


def found_measures(names: Iterable[str], prefix: str) -> list[str]:
    """Return those of MEASURES, in their order, that are among metric names with a prefix, "val" or "knn"."""
    present = set(names)
    return [name for name in MEASURES if f"{prefix}_{name}" in present]


def describe(results: Mapping[str, Any], prefix: str) -> str:
    """Write metrics with a prefix in one line, such as "top-1 71.25 %, top-5 90.10 %, loss 1.2345"."""
    return ", ".join(
        f"{MEASURES[name].label} {MEASURES[name].text(results[f'{prefix}_{name}'])}"
        for name in found_measures(results, prefix)
    )
