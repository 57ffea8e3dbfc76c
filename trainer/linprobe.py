"""A linear classifier on what a frozen encoder says: linear probing (paper, appendix A.1, Table 10)."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pipeline.decode import Decoder
from pipeline.loader import TrainBatch
from pipeline.manifest import Dataset, open_dataset
from trainer.classifier import Encoder
from trainer.config import InitConfig, LinprobeConfig
from trainer.device import autocast, dtype_of, in_precision
from trainer.evaluate import check_classes, check_labels, evaluate
from trainer.initial import load_encoder
from trainer.loop import Task, micro_batches, part_of, train, wrapped
from trainer.micro_batch import with_micro_batch
from trainer.optim import LARS
from trainer.run import Run

HEAD_STD = 0.01  # the authors' main_linprobe.py
NORM_EPS = 1e-6
NORM_MOMENTUM = 0.1  # torch's default: how much of the running statistics a step replaces


class Probe(nn.Module):
    """A frozen encoder, BatchNorm without affine, and a linear layer (`head.0`, `head.1` in the authors' checkpoints)."""

    def __init__(self, config: LinprobeConfig, classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(config.model).requires_grad_(False)
        self.norm = nn.BatchNorm1d(config.model.width, eps=NORM_EPS, momentum=NORM_MOMENTUM, affine=False)
        self.linear = nn.Linear(config.model.width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=HEAD_STD)
        nn.init.zeros_(self.linear.bias)
        self.norm.eval()  # it never sees a batch: statistics are of all workers, see `normalised`

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8[n, 3, h, w] → the class token, float[n, width]."""
        return self.encoder(images)[:, 0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """→ logits [n, classes], by the running statistics; what is trained is in full precision."""
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.linear(self.norm(features.to(self.linear.weight.dtype)))


def linprobe(config: LinprobeConfig, dataset: Dataset, run: Run) -> bool:
    """Train the linear classifier, see `trainer.loop.train`."""
    val = open_dataset(config.data.val, known=True) if config.data.val else None
    classes = check_classes(dataset, val)
    torch.manual_seed(config.seed)  # the same weights on every rank
    model = Probe(config, classes).to(run.device, dtype_of(config))
    optimizer = LARS(model.linear.parameters(), config.optim)
    config = with_micro_batch(config, dataset, run, model, model.features)
    linear = wrapped(model.linear, config, run)

    def begin() -> None:
        if isinstance(config.init, InitConfig):
            load_encoder(config.init, model.encoder, "norm")

    def judge(decoder: Decoder) -> dict[str, float]:
        assert val is not None
        logits = in_precision(model, config, run.device)
        return evaluate(logits, val, decoder, config.data.val_crop, config.at_once, run)

    task = Task(
        model,
        optimizer,
        config.model.size,
        step=lambda batch: linprobe_step(linear, model, optimizer, batch, config, run),
        begin=begin,
        evaluate=judge if val else None,
        evaluate_every=config.evaluate_every,
    )
    return train(task, config, dataset, run)


def linprobe_step(
    linear: nn.Module,
    model: Probe,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    config: LinprobeConfig,
    run: Run,
) -> torch.Tensor:
    """One step; returns what `trainer.loop.train_step` does. The features of all of the batch come first, because the
    statistics are those of the global batch, at any world size."""
    check_labels(batch.labels)
    found = []
    for rows in micro_batches(batch, config.at_once):
        with autocast(config, run.device):
            images = part_of(batch, rows, run.device).images
            run.laps.lap("host_to_device")
            found.append(model.features(images).to(model.linear.weight.dtype))
        run.laps.lap("step")
    weights = batch.weights.to(run.device, non_blocking=True)
    labels = batch.labels.to(run.device, non_blocking=True)
    moments = batch_moments(torch.cat(found), weights, run)
    features = normalised(torch.cat(found), moments)
    losses = F.cross_entropy(linear(features), labels, reduction="none")
    loss = (losses * weights).sum()
    (loss * (run.world_size / config.global_batch)).backward()
    run.laps.lap("all_reduce" if run.world_size > 1 else "step")
    optimizer.step()  # before which a snapshot may still be reading what is changed here and next
    follow(model.norm, moments)
    optimizer.zero_grad(set_to_none=True)
    run.laps.lap("step")
    return torch.stack([loss.detach().double(), (weights == 0).sum().double()])


class Moments(NamedTuple):
    """Of features over the good samples of all workers."""

    mean: torch.Tensor  # float64[width]
    variance: torch.Tensor  # float64[width], biased
    samples: torch.Tensor  # float64[]


@torch.no_grad()
def batch_moments(x: torch.Tensor, weights: torch.Tensor, run: Run) -> Moments:
    """Of features float[n, width] of this worker; weights float[n]: 1, or 0 for what is bad. Sums are in float64, so that the
    world size changes nothing."""
    good = x.double() * weights[:, None]
    sums = torch.cat([good.sum(dim=0), (good * x).sum(dim=0), weights.double().sum()[None]])
    if run.world_size > 1:
        dist.all_reduce(sums)
    count = sums[-1].clamp(min=1)
    mean, squares = (sums[:-1] / count).chunk(2)
    return Moments(mean, (squares - mean.square()).clamp(min=0), count)


def normalised(x: torch.Tensor, moments: Moments) -> torch.Tensor:
    return ((x - moments.mean) / (moments.variance + NORM_EPS).sqrt()).to(x.dtype)


def follow(norm: nn.BatchNorm1d, moments: Moments) -> None:
    """The running statistics follow those of a batch, as torch's BatchNorm does it."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    unbiased = moments.variance * moments.samples / (moments.samples - 1).clamp(min=1)
    norm.running_mean.lerp_(moments.mean.to(norm.running_mean), NORM_MOMENTUM)
    norm.running_var.lerp_(unbiased.to(norm.running_var), NORM_MOMENTUM)
