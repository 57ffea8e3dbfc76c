"""Fine-tuning: training an encoder, or its last blocks, with a head for labels; also supervised training from scratch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.arrays import Ints
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.decoder import Decoder, Size
from pipeline.errors import UserError
from pipeline.loading.loader import Batch, TrainBatch
from trainer.augment.mixing import erase, mix, mixing_partners, mixing_plan
from trainer.config.device import weight_dtype, with_autocast
from trainer.config.optim_schema import MixingConfig
from trainer.config.schema import FinetuneConfig, InitConfig
from trainer.evaluate.accuracy import check_labels
from trainer.evaluate.predictions import evaluate
from trainer.labels.labels import Labels, check_same_labels, labels_of_run
from trainer.models.classifier import Classifier
from trainer.run.checkpoint import EMA
from trainer.run.run import Run
from trainer.run.worker import Callbacks, Worker
from trainer.step.micro_batch import with_micro_batch
from trainer.step.objective import make_targets, sample_losses
from trainer.step.optim import layered_adamw
from trainer.step.step import TrainedModel, train_step, wrap_for_training
from trainer.train.loop import train
from trainer.weights.init import freeze, init_encoder

HEAD_STD = 2e-5  # initial weights of the head (the authors' main_finetune.py): logits are near 0 at first


def finetune(
    config: FinetuneConfig, dataset: Dataset, run: Run, worker: Worker, callbacks: Callbacks
) -> bool:
    """Fine-tune a model with a head for the dataset's labels; see `trainer.train.loop.train`."""
    val = open_dataset(config.data.val, already_reached=True) if config.data.val else None
    labels = labels_of_run(run.store, dataset)
    check_mixing(config, labels)
    if val:
        check_same_labels(dataset, val)
    torch.manual_seed(config.seed)  # the same weights on every rank
    model = Classifier(config.model, labels.outputs).to(worker.device, weight_dtype(config))
    if config.blocks != "all":
        freeze(model, config.model.depth, config.blocks)
    optimizer = layered_adamw(model, config.model.depth, config.optim, config.optim.layer_decay)
    assert config.data.lanes is not None
    multiple_of = config.global_batch // config.data.lanes if config.mixing.mixes else 1
    config = with_micro_batch(config, dataset, worker, callbacks, model, model, multiple_of)
    trained = wrap_for_training(model, config, worker)
    task = FinetuneTask(config, labels, val, worker, model, trained, optimizer)
    return train(task, config, dataset, run, worker, callbacks)


def check_mixing(config: FinetuneConfig, labels: Labels) -> None:
    """Raise UserError if the config mixes or smooths labels that are numbers."""
    mixing = config.mixing
    if labels.kind == "numbers" and (mixing.mixes or mixing.smoothing):
        raise UserError(
            "mixup, CutMix and label smoothing are for classes, but the labels are numbers: "
            "set mixing.mixup=0 mixing.cutmix=0 mixing.smoothing=0"
        )


@dataclass
class FinetuneTask:
    """A `trainer.train.task.Task`: fine-tuning, with evaluation of the averaged weights on a validation dataset."""

    config: FinetuneConfig
    labels: Labels
    val: Dataset | None
    worker: Worker
    model: Classifier
    trained: TrainedModel
    optimizer: torch.optim.Optimizer
    decoder: Decoder | None = None

    @property
    def image_size(self) -> Size:
        return self.config.model.size

    @property
    def evaluate_every(self) -> float | None:
        return self.config.evaluate_every if self.val else None

    def begin(self) -> None:
        config = self.config
        if isinstance(config.init, InitConfig):
            norm = "norm" if config.model.pool == "class" else None
            self.worker.log(init_encoder(config.init, self.model, norm))
            nn.init.trunc_normal_(self.model.head.weight, std=HEAD_STD)

    def prepare(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def become_main(self) -> None:
        pass

    def step(self, batch: TrainBatch) -> torch.Tensor:
        sums = finetune_step(
            self.trained, self.model, self.optimizer, batch, self.config, self.worker, self.labels
        )
        if self.config.optim.ema:
            average(self.model, self.optimizer, self.config.optim.ema)
        return sums

    def evaluate(self, step: int) -> dict[str, float]:
        assert self.val is not None
        assert self.decoder is not None
        config, labels = self.config, self.labels
        outputs = with_autocast(self.model, config, self.worker.device)
        crop, batch = config.data.val_crop, config.micro_batch_size
        with averaged(self.model, self.optimizer):
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


def finetune_step(
    trained: TrainedModel,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    config: FinetuneConfig,
    worker: Worker,
    labels: Labels,
) -> torch.Tensor:
    """One optimizer step; `labels` are the run's, the other arguments and the result as in `trainer.step.step.train_step`."""
    assert config.data.lanes is not None
    check_labels(batch.labels)
    per_lane = config.global_batch // config.data.lanes

    def losses(part: Batch, on_host: Batch) -> torch.Tensor:
        ids, weights = on_host.random_ids.numpy(), on_host.weights.numpy()
        with torch.autocast(
            worker.device.type, enabled=False
        ):  # bf16 sampling grids are off by a quarter of a pixel
            targets = make_targets(part.labels, labels, config.mixing.smoothing, model.head.weight.dtype)
            images, targets = augment(
                part, targets, ids, weights, model, config.mixing, config.seed, batch.epoch, per_lane
            )
        kept = (
            model.drop_path_scales(config.seed, batch.epoch, part.random_ids)
            if config.model.drop_path
            else None
        )
        return sample_losses(trained.forward(images, kept, True), targets, labels.kind)

    return train_step(
        trained, optimizer, batch, config, worker, losses, per_lane if config.mixing.mixes else 1
    )


@torch.no_grad()
def augment(
    part: Batch,
    targets: torch.Tensor,
    ids: Ints,
    weights: np.ndarray,
    model: Classifier,
    mixing: MixingConfig,
    seed: int,
    epoch: int,
    per_lane: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment a micro-batch, in full precision. A pure function of the seed, the epoch and the sample ids.

    Args:
        part: a micro-batch on the device.
        targets: float[n, k], see `trainer.step.objective.make_targets`.
        ids: int64[n], its sample ids, on the host.
        weights: float[n], 0 for bad samples and 1 for others, on the host.
        per_lane: consecutive samples that belong to the same lane; mixup and CutMix mix only those.

    Returns images, float[n, c, h, w], normalised, and targets, float[n, k].
    """
    images = model.scale(part.images)
    if mixing.magnitude:
        from trainer.augment.randaugment import randaugment  # imports kornia, which takes seconds

        images = randaugment(
            images, model.pixel_mean.flatten(), seed, epoch, ids, mixing.magnitude, mixing.magnitude_std
        )
    images = (images - model.pixel_mean) / model.pixel_std
    images = erase(images, mixing.erase, seed, epoch, ids)
    if mixing.mixes:
        height, width = images.shape[2:]
        kept, boxes = mixing_plan(mixing.mixup, mixing.cutmix, seed, epoch, ids, height, width)
        images, targets = mix(images, targets, mixing_partners(weights, per_lane), kept, boxes)
    return images, targets


@torch.no_grad()
def average(model: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Update the exponential moving average of the weights: average ← decay · average + (1 − decay) · weights.

    It is kept in the optimizer's state, so checkpoints and snapshots contain it.
    """
    trained: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        if EMA not in optimizer.state[parameter]:
            optimizer.state[parameter][EMA] = parameter.clone()
    torch._foreach_lerp_([optimizer.state[parameter][EMA] for parameter in trained], trained, 1 - decay)


@contextmanager
def averaged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give the model its averaged weights, where it has some, until the context is left."""
    trained = {p: p.data for p in model.parameters() if EMA in optimizer.state.get(p, {})}
    for parameter in trained:
        parameter.data = optimizer.state[parameter][EMA]
    try:
        yield
    finally:
        for parameter, data in trained.items():
            parameter.data = data
