"""Linear probing: training a linear layer on the features of a frozen encoder (paper, appendix A.1, Table 10)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.decoder import Decoder, Size
from pipeline.loading.loader import TrainBatch
from trainer.config.device import autocast, weight_dtype, with_autocast
from trainer.config.schema import InitConfig, LinprobeConfig
from trainer.evaluate.accuracy import check_labels
from trainer.evaluate.predictions import evaluate
from trainer.group.group import Group
from trainer.labels.labels import Labels, check_same_labels, labels_of_run
from trainer.models.probe import NORM_EPS, NORM_MOMENTUM, Probe
from trainer.run.run import Run
from trainer.run.worker import Callbacks, Worker
from trainer.step.micro_batch import with_micro_batch
from trainer.step.objective import make_targets, sample_losses
from trainer.step.optim import LARS
from trainer.step.step import TrainedModel, micro_batches, rows_of, to_device, wrap_for_training
from trainer.train.loop import train
from trainer.weights.init import init_encoder


def linprobe(
    config: LinprobeConfig, dataset: Dataset, run: Run, worker: Worker, callbacks: Callbacks
) -> bool:
    """Train the linear layer; see `trainer.train.loop.train`."""
    val = open_dataset(config.data.val, already_reached=True) if config.data.val else None
    labels = labels_of_run(run.store, dataset)
    if val:
        check_same_labels(dataset, val)
    torch.manual_seed(config.seed)  # the same weights on every rank
    model = Probe(config, labels.outputs).to(worker.device, weight_dtype(config))
    optimizer = LARS(model.linear.parameters(), config.optim)
    config = with_micro_batch(config, dataset, worker, callbacks, model, model.features)
    linear = wrap_for_training(model.linear, config, worker)
    task = LinprobeTask(config, labels, val, worker, model, linear, optimizer)
    return train(task, config, dataset, run, worker, callbacks)


@dataclass
class LinprobeTask:
    """A `trainer.train.task.Task`: linear probing, with evaluation on a validation dataset."""

    config: LinprobeConfig
    labels: Labels
    val: Dataset | None
    worker: Worker
    model: Probe
    linear: TrainedModel  # the model's linear layer
    optimizer: torch.optim.Optimizer
    decoder: Decoder | None = None

    @property
    def image_size(self) -> Size:
        return self.config.model.size

    @property
    def evaluate_every(self) -> float | None:
        return self.config.evaluate_every if self.val else None

    def begin(self) -> None:
        if isinstance(self.config.init, InitConfig):
            self.worker.log(init_encoder(self.config.init, self.model.encoder, "norm"))

    def prepare(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def become_main(self) -> None:
        pass

    def step(self, batch: TrainBatch) -> torch.Tensor:
        return linprobe_step(
            self.linear, self.model, self.optimizer, batch, self.config, self.worker, self.labels
        )

    def evaluate(self, step: int) -> dict[str, float]:
        assert self.val is not None
        assert self.decoder is not None
        config, labels = self.config, self.labels
        outputs = with_autocast(self.model, config, self.worker.device)
        crop, batch = config.data.val_crop, config.micro_batch_size
        return evaluate(
            lambda images: labels.in_units(outputs(images)),
            labels, self.val, self.decoder, crop, batch, self.worker,
        )  # fmt: skip

    def results(self, wait: bool) -> dict[str, float]:
        return {}

    def picture(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def linprobe_step(
    linear: TrainedModel,
    model: Probe,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    config: LinprobeConfig,
    worker: Worker,
    labels: Labels,
) -> torch.Tensor:
    """One optimizer step of the linear layer; returns and raises what `trainer.step.step.train_step` describes.

    Features of the whole batch are computed first: batch normalisation needs the statistics of the global batch, which are
    the same at any world size.
    """
    check_labels(batch.labels)
    features = []
    for rows in micro_batches(batch, config.micro_batch_size):
        with autocast(config, worker.device):
            images = to_device(rows_of(batch, rows), worker.device).images
            worker.timer.mark("host_to_device")
            features.append(model.features(images).to(model.linear.weight.dtype))
        worker.timer.mark("step")
    weights = batch.weights.to(worker.device, non_blocking=True)
    targets = batch.labels.to(worker.device, non_blocking=True)
    moments = batch_moments(torch.cat(features), weights, worker.group)
    normalised = normalise(torch.cat(features), moments)
    losses = probe_losses(linear.forward(normalised), targets, labels)
    loss = (losses * weights).sum()
    linear.gradients.begin()
    (loss / config.global_batch).backward()
    worker.timer.mark("step")
    linear.gradients.finish()
    sums = torch.stack([loss.detach().double(), (weights == 0).sum().double()])
    worker.group.all_reduce(sums)  # raises if a worker was lost in this step, see `trainer.group.group`
    worker.timer.mark("all_reduce" if worker.world_size > 1 else "step")
    optimizer.step()  # first waits for a snapshot's copy of the weights and of the statistics, which change next
    update_running_statistics(model.norm, moments)
    optimizer.zero_grad(set_to_none=True)
    worker.timer.mark("step")
    return sums


def probe_losses(outputs: torch.Tensor, batch_labels: torch.Tensor, labels: Labels) -> torch.Tensor:
    """Return the loss of each sample, float[n], of outputs float[n, k] and labels of a batch on the same device."""
    if labels.kind == "class":
        return F.cross_entropy(outputs, batch_labels, reduction="none")
    return sample_losses(outputs, make_targets(batch_labels, labels, 0.0, outputs.dtype), labels.kind)


class Moments(NamedTuple):
    """Statistics of features over the good samples of the global batch."""

    mean: torch.Tensor  # float64[width]
    variance: torch.Tensor  # float64[width], biased (divided by `samples`)
    samples: torch.Tensor  # float64[]


@torch.no_grad()
def batch_moments(x: torch.Tensor, weights: torch.Tensor, group: Group) -> Moments:
    """Compute the statistics of the global batch. Call it on every rank. Raises WorkerLost.

    Sums are float64, so that the result does not depend on the world size.

    Args:
        x: float[n, width], this worker's features.
        weights: float[n], 0 for bad samples and 1 for others.
    """
    good = x.double() * weights[:, None]
    sums = torch.cat([good.sum(dim=0), (good * x).sum(dim=0), weights.double().sum()[None]])
    group.all_reduce(sums)
    count = sums[-1].clamp(min=1)
    mean, squares = (sums[:-1] / count).chunk(2)
    return Moments(mean, (squares - mean.square()).clamp(min=0), count)


def normalise(x: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Normalise features, float[n, width], to mean 0 and variance 1, in float64. Returns them in the dtype of `x`."""
    return ((x - moments.mean) / (moments.variance + NORM_EPS).sqrt()).to(x.dtype)


def update_running_statistics(norm: nn.BatchNorm1d, moments: Moments) -> None:
    """Update running mean and variance as torch.nn.BatchNorm1d does in training: the variance of a batch is unbiased."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    unbiased = moments.variance * moments.samples / (moments.samples - 1).clamp(min=1)
    norm.running_mean.lerp_(moments.mean.to(norm.running_mean), NORM_MOMENTUM)
    norm.running_var.lerp_(unbiased.to(norm.running_var), NORM_MOMENTUM)
