"""MAE pre-training."""

from dataclasses import dataclass

import torch

from pipeline.dataset.dataset import Dataset
from pipeline.decode.decoder import Decoder, Size
from pipeline.loading.loader import Batch, TrainBatch
from pipeline.storage.store import Store
from trainer.config.device import weight_dtype
from trainer.config.schema import InitConfig, PretrainConfig
from trainer.evaluate.online_knn import OnlineKnn
from trainer.evaluate.reconstruct import draw_grid, load_evenly_spaced, reconstruct
from trainer.models.mae import MAE
from trainer.models.masking import masking_noise
from trainer.run.run import Run
from trainer.run.worker import Callbacks, Worker
from trainer.step.micro_batch import with_micro_batch
from trainer.step.optim import adamw
from trainer.step.step import TrainedModel, train_step, wrap_for_training
from trainer.train.loop import train
from trainer.weights.init import init_mae

PICTURE_SAMPLES = 12


def pretrain(
    config: PretrainConfig, dataset: Dataset, run: Run, worker: Worker, callbacks: Callbacks
) -> bool:
    """Pre-train an MAE; see `trainer.train.loop.train`."""
    torch.manual_seed(config.seed)  # the same weights on every rank
    model = MAE(config.model).to(worker.device, weight_dtype(config))
    optimizer = adamw(model, config.optim)

    def forward(images: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(len(images), device=worker.device)
        return model(images, masking_noise(config.model, config.seed, 0, ids))

    config = with_micro_batch(config, dataset, worker, callbacks, model, forward)
    trained = wrap_for_training(model, config, worker)
    task = PretrainTask(config, dataset, run.store, worker, model, trained, optimizer)
    return train(task, config, dataset, run, worker, callbacks)


@dataclass
class PretrainTask:
    """A `trainer.train.task.Task`: pre-training, with k-NN evaluation in the background and pictures of reconstructions."""

    config: PretrainConfig
    dataset: Dataset
    store: Store  # the run folder, for pictures
    worker: Worker
    model: MAE
    trained: TrainedModel
    optimizer: torch.optim.Optimizer
    decoder: Decoder | None = None
    picture_samples: Batch | None = None  # rank 0 only, as is `knn`
    knn: OnlineKnn | None = None

    @property
    def image_size(self) -> Size:
        return self.config.model.size

    @property
    def evaluate_every(self) -> float | None:
        return self.config.knn.every if self.config.knn else None

    def begin(self) -> None:
        if isinstance(self.config.init, InitConfig):
            self.worker.log(init_mae(self.config.init, self.model))

    def prepare(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def become_main(self) -> None:
        assert self.decoder is not None
        self.picture_samples = load_evenly_spaced(self.dataset, self.decoder, PICTURE_SAMPLES)
        if self.config.knn:
            self.knn = OnlineKnn(self.config, self.dataset, self.decoder, self.worker.device)

    def step(self, batch: TrainBatch) -> torch.Tensor:
        return pretrain_step(self.trained, self.optimizer, batch, self.config, self.worker)

    def evaluate(self, step: int) -> dict[str, float]:
        if self.knn:
            self.knn.start(step, self.model)
        return {}

    def results(self, wait: bool) -> dict[str, float]:
        return self.knn.poll(wait) if self.knn else {}

    def picture(self, step: int) -> None:
        assert self.picture_samples is not None
        device = self.worker.device
        images, ids = self.picture_samples.images.to(device), self.picture_samples.sample_ids.to(device)
        result = reconstruct(self.model, images, ids, self.config.seed)
        self.store.write(f"pictures/step-{step:08d}.png", draw_grid(result))

    def close(self) -> None:
        if self.knn:
            self.knn.close()


def pretrain_step(
    trained: TrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    config: PretrainConfig,
    worker: Worker,
) -> torch.Tensor:
    """One optimizer step of an MAE; arguments and result as in `trainer.step.step.train_step`."""

    def losses(part: Batch, on_host: Batch) -> torch.Tensor:
        images = part.images
        if config.jitter:
            from trainer.augment.randaugment import colour_jitter  # imports kornia, which takes seconds

            ids = on_host.random_ids.numpy()
            with torch.autocast(worker.device.type, enabled=False):
                images = colour_jitter(images, config.jitter, config.seed, batch.epoch, ids)
        noise = masking_noise(config.model, config.seed, batch.epoch, part.random_ids)
        return trained.forward(images, noise)

    return train_step(trained, optimizer, batch, config, worker, losses)
