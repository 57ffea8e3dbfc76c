"""The interface between the training loop and what is trained: pretrain, finetune or linprobe."""

from typing import Protocol

import torch
from torch import nn

from pipeline.decode.decoder import Decoder, Size
from pipeline.loading.loader import TrainBatch


class Task(Protocol):
    """A model, its optimizer, and the parts of training that differ between tasks.

    Methods are called on every rank unless they say otherwise.
    """

    @property
    def model(self) -> nn.Module:
        """The model whose state dict checkpoints contain."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of `model`. The "scale" of a parameter group, if it has one, multiplies its learning rate."""

    @property
    def image_size(self) -> Size:
        """Height and width of the images that the model takes, in pixels."""

    @property
    def evaluate_every(self) -> float | None:
        """Epochs between two evaluations; None: no evaluation."""

    def begin(self) -> None:
        """Set the initial weights of a new run. Not called when a run resumes."""

    def prepare(self, decoder: Decoder) -> None:
        """Get what evaluations and pictures need. Called once, before the workers meet."""

    def become_main(self) -> None:
        """Set up what only rank 0 does. Called on rank 0 before its first step as such."""

    def step(self, batch: TrainBatch) -> torch.Tensor:
        """Do one optimizer step. Returns and raises what `trainer.step.step.train_step` describes."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the model after `step` steps. Returns metrics, the same on every rank. Raises
        WorkerLost; then it is called again.

        A task that evaluates in the background only starts it here and returns nothing; `results` has the metrics.
        """

    def results(self, wait: bool) -> dict[str, float]:
        """Metrics of a background evaluation that has finished since the last call, or nothing.

        Args:
            wait: wait for the evaluation in progress.
        """

    def picture(self, step: int) -> None:
        """Write a picture of the model's predictions after `step` steps, if the task has one. Rank 0 only."""

    def close(self) -> None:
        """Stop background work."""
