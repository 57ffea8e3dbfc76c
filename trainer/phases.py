"""The phases of a run whose dataset has grown: which epochs train on which state of the dataset.

A phase lasts to the next one's first epoch, the last one to the end of the run. Each begins with an epoch. RUN/run.json has
them; a run whose dataset has never grown has one phase, which is not written.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Epochs that train on one state of the dataset."""

    fingerprint: str  # of the dataset
    samples: int
    shards: int
    first_epoch: int
    first_step: int  # of the run
    steps_per_epoch: int

    @property
    def shift(self) -> int:
        """What to add to a step of the run for the step of this dataset's order, which counts as if all earlier epochs had
        been of this phase, too."""
        return self.first_epoch * self.steps_per_epoch - self.first_step


def total_steps(phases: Sequence[Phase], epochs: float) -> int:
    """Steps of a run of so many epochs."""
    last = phases[-1]
    return max(1, round(epochs * last.steps_per_epoch)) - last.shift


def with_growth(
    phases: Sequence[Phase],
    step: int,
    epochs: float,
    fingerprint: str,
    samples: int,
    shards: int,
    steps_per_epoch: int,
) -> list[Phase]:
    """The phases of a run that has done `step` steps, and whose dataset has grown.

    The larger dataset begins with the next epoch, unless less than one epoch would be left. Phases that have not begun are
    dropped: the run went back to a step before them.

    Args:
        fingerprint, samples, shards, steps_per_epoch: of the larger dataset.
    """
    begun = [phase for nth, phase in enumerate(phases) if nth == 0 or phase.first_step < step]
    now = begun[-1]
    epoch = now.first_epoch + max(0, math.ceil((step - now.first_step) / now.steps_per_epoch))
    if epochs - epoch < 1:
        return list(phases)
    first_step = now.first_step + (epoch - now.first_epoch) * now.steps_per_epoch
    kept = begun if epoch > now.first_epoch else begun[:-1]
    return [*kept, Phase(fingerprint, samples, shards, epoch, first_step, steps_per_epoch)]
