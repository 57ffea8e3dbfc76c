"""MAE pre-training."""

from collections.abc import Callable

import torch
from torch import nn

from pipeline.decode import Decoder
from pipeline.loader import Batch, TrainBatch
from pipeline.manifest import Dataset
from trainer.config import InitConfig, PretrainConfig
from trainer.device import dtype_of
from trainer.initial import load_mae
from trainer.loop import Task, train, train_step, wrapped
from trainer.mae import MAE
from trainer.masks import noise_of
from trainer.micro_batch import with_micro_batch
from trainer.online_knn import OnlineKnn
from trainer.optim import adamw
from trainer.reconstruct import draw_grid, evenly_spread, reconstruct
from trainer.run import Run


def pretrain(config: PretrainConfig, dataset: Dataset, run: Run) -> bool:
    """Pre-train an MAE, see `trainer.loop.train`."""
    torch.manual_seed(config.seed)  # the same weights on every rank
    model = MAE(config.model).to(run.device, dtype_of(config))
    optimizer = adamw(model, config.optim)

    def forward(images: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(len(images), device=run.device)
        return model(images, noise_of(config.model, config.seed, 0, ids))

    config = with_micro_batch(config, dataset, run, model, forward)
    trained = wrapped(model, config, run)

    def picture(decoder: Decoder) -> Callable[[int], None]:
        sitters = evenly_spread(dataset, decoder, 12)  # the same samples in every picture

        def draw(step: int) -> None:
            images, ids = sitters.images.to(run.device), sitters.sample_ids.to(run.device)
            result = reconstruct(model, images, ids, config.seed)
            run.store.write(f"pictures/step-{step:08d}.png", draw_grid(result))

        return draw

    def begin() -> None:
        if isinstance(config.init, InitConfig):
            load_mae(config.init, model)

    task = Task(
        model,
        optimizer,
        config.model.size,
        step=lambda batch: pretrain_step(trained, optimizer, batch, config, run),
        begin=begin,
        picture=picture,
        knn=(lambda decoder: OnlineKnn(config, dataset, decoder, run)) if config.knn else None,
        evaluate_every=config.knn.every if config.knn else 1.0,
    )
    return train(task, config, dataset, run)


def pretrain_step(
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    config: PretrainConfig,
    run: Run,
) -> torch.Tensor:
    """One step, see `trainer.loop.train_step`."""

    def losses(part: Batch, rows: slice) -> torch.Tensor:
        images = part.images
        if config.jitter:
            from trainer.randaugment import jitter  # seconds, and only here: kornia

            ids = batch.sample_ids[rows].numpy()  # on the host
            with torch.autocast(run.device.type, enabled=False):
                images = jitter(images, config.jitter, config.seed, batch.epoch, ids)
        noise = noise_of(config.model, config.seed, batch.epoch, part.sample_ids)
        return trained(images, noise)

    return train_step(trained, optimizer, batch, config, run, losses)
