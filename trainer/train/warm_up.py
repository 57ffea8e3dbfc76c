"""Compile the step and let the device allocate its memory, before a worker joins others that would wait for it."""

import numpy as np
import torch

from pipeline.dataset.dataset import Dataset
from pipeline.decode.decoder import Decoder
from pipeline.loading.loader import TrainBatch
from pipeline.stage_times import StageTimes
from trainer.config.schema import RunConfig
from trainer.run.worker import Worker
from trainer.train.task import Task


def warm_up(task: Task, config: RunConfig, dataset: Dataset, decoder: Decoder, worker: Worker) -> None:
    """Do a step on samples of weight 0 with learning rate 0, and forget it. Call it before `Group.rebuild`.

    A linear probe is not warmed up: its step is short, and would change the statistics of its normalisation.
    """
    if config.task == "linprobe":
        return
    assert config.data.lanes is not None
    samples = min(config.micro_batch_size, config.global_batch // config.data.lanes)
    images = decoder([b""] * samples, np.ones((samples, 4), np.int64), np.zeros(samples, np.bool_)).images
    ids = np.zeros(samples, np.int64)
    labels = torch.from_numpy(dataset.labels(dataset.locate(ids).row))
    batch = TrainBatch(
        images,
        labels,
        torch.from_numpy(ids),
        torch.zeros(samples),
        {},
        StageTimes(),
        step=0,
        epoch=0,
        wait_s=0.0,
    )
    for group in task.optimizer.param_groups:
        group["lr"] = 0.0
    task.step(batch)
    task.optimizer.state.clear()
