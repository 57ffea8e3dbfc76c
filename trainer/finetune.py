"""Fine-tuning an encoder, or some of its blocks, to name classes; and the same from scratch."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.decode import Decoder
from pipeline.loader import Batch, TrainBatch
from pipeline.manifest import Dataset, open_dataset
from pipeline.order import Ints
from trainer.checkpoint import EMA
from trainer.classifier import Classifier
from trainer.config import FinetuneConfig, InitConfig
from trainer.device import dtype_of, in_precision
from trainer.evaluate import check_classes, check_labels, evaluate
from trainer.initial import freeze, load_encoder
from trainer.loop import Task, train, train_step, wrapped
from trainer.micro_batch import with_micro_batch
from trainer.mixing import erase, mix, mixing_plan, partners, smooth_targets
from trainer.optim import layered_adamw
from trainer.run import Run

HEAD_STD = 2e-5  # the authors' main_finetune.py: a head that says next to nothing at first


def finetune(config: FinetuneConfig, dataset: Dataset, run: Run) -> bool:
    """Fine-tune, see `trainer.loop.train`."""
    val = open_dataset(config.data.val, known=True) if config.data.val else None
    classes = check_classes(dataset, val)
    torch.manual_seed(config.seed)  # the same weights on every rank
    model = Classifier(config.model, classes).to(run.device, dtype_of(config))
    if config.blocks != "all":
        freeze(model, config.model.depth, config.blocks)
    optimizer = layered_adamw(model, config.model.depth, config.optim, config.optim.layer_decay)
    assert config.data.lanes is not None
    together = config.global_batch // config.data.lanes if config.mixing.mixes else 1
    config = with_micro_batch(config, dataset, run, model, model, together)
    trained = wrapped(model, config, run)

    def begin() -> None:
        if isinstance(config.init, InitConfig):
            load_encoder(config.init, model, "norm" if config.model.pool == "class" else None)
            nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)

    def step(batch: TrainBatch) -> torch.Tensor:
        sums = finetune_step(trained, model, optimizer, batch, config, run)
        if config.optim.ema:
            average(model, optimizer, config.optim.ema)
        return sums

    def judge(decoder: Decoder) -> dict[str, float]:
        assert val is not None
        logits = in_precision(model, config, run.device)
        with averaged(model, optimizer):
            return evaluate(logits, val, decoder, config.data.val_crop, config.at_once, run)

    task = Task(
        model,
        optimizer,
        config.model.size,
        step,
        begin,
        evaluate=judge if val else None,
        evaluate_every=config.evaluate_every,
    )
    return train(task, config, dataset, run)


def finetune_step(
    trained: nn.Module,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    config: FinetuneConfig,
    run: Run,
) -> torch.Tensor:
    """One step, see `trainer.loop.train_step`."""
    assert config.data.lanes is not None
    check_labels(batch.labels)
    per_lane = config.global_batch // config.data.lanes

    def losses(part: Batch, rows: slice) -> torch.Tensor:
        ids, weights = batch.sample_ids[rows].numpy(), batch.weights[rows].numpy()  # of the host
        with torch.autocast(run.device.type, enabled=False):  # a bf16 grid is off by a quarter of a pixel
            images, targets = augmented(part, ids, weights, model, config, batch.epoch, per_lane)
        kept = (
            model.kept_branches(config.seed, batch.epoch, part.sample_ids) if config.model.drop_path else None
        )
        return -(targets * F.log_softmax(trained(images, kept), dim=-1)).sum(dim=-1)

    return train_step(trained, optimizer, batch, config, run, losses, per_lane if config.mixing.mixes else 1)


@torch.no_grad()
def augmented(
    part: Batch,
    ids: Ints,
    weights: np.ndarray,
    model: Classifier,
    config: FinetuneConfig,
    epoch: int,
    per_lane: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (normalised floats) and soft targets of a micro-batch: a pure function of (seed, epoch, sample id), in full
    precision."""
    seed, mixing = config.seed, config.mixing
    images = part.images.to(model.pixel_mean.dtype) / 255
    if mixing.magnitude:
        from trainer.randaugment import randaugment  # seconds, and only here: kornia

        images = randaugment(
            images, model.pixel_mean.flatten(), seed, epoch, ids, mixing.magnitude, mixing.magnitude_std
        )
    images = (images - model.pixel_mean) / model.pixel_std
    images = erase(images, mixing.erase, seed, epoch, ids)
    targets = smooth_targets(part.labels, model.head.out_features, mixing.smoothing)
    if mixing.mixes:
        height, width = images.shape[2:]
        kept, boxes = mixing_plan(mixing.mixup, mixing.cutmix, seed, epoch, ids, height, width)
        images, targets = mix(images, targets, partners(weights, per_lane), kept, boxes)
    return images, targets


@torch.no_grad()
def average(model: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Keep a moving average of the weights, among the optimizer's state, so that it goes where that goes."""
    trained: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        if EMA not in optimizer.state[parameter]:
            optimizer.state[parameter][EMA] = parameter.clone()
    torch._foreach_lerp_([optimizer.state[parameter][EMA] for parameter in trained], trained, 1 - decay)


@contextmanager
def averaged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The model with its averaged weights, where there are such."""
    trained = {p: p.data for p in model.parameters() if EMA in optimizer.state.get(p, {})}
    for parameter in trained:
        parameter.data = optimizer.state[parameter][EMA]
    try:
        yield
    finally:
        for parameter, data in trained.items():
            parameter.data = data
