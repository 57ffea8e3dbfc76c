"""Pre-training with stock Ray Train, for comparison in benchmarks.elasticity.

    python -m benchmarks.elasticity.stock_ray CONFIG DATA OUT COMPILE_S

Written as in Ray's documentation: rank 0 saves model, optimizer and step in a checkpoint every EVERY_STEPS steps and
reports it with `ray.train.report`; a restart continues from it. One to three workers, any number of failures, and Ray's
defaults for everything else. Model, batches, optimizer step and learning rate are maestream's, so that a step costs the
same.

OUT/steps.jsonl gets a row per step; OUT/ray/ is Ray's folder. COMPILE_S: see `benchmarks.elasticity.compiling`.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.elasticity.compiling import compile_first
from pipeline.cpus import available_cores
from pipeline.dataset.dataset import open_dataset
from pipeline.decode.factory import make_decoder
from pipeline.loading.loader import Loader
from trainer.config.recipe import load_config
from trainer.config.schema import PretrainConfig
from trainer.group.group import Group
from trainer.models.mae import MAE
from trainer.run.run import fix_order, make_order
from trainer.run.worker import Worker
from trainer.step.optim import adamw, learning_rate
from trainer.step.step import wrap_for_training
from trainer.train.pretrain import pretrain_step

EVERY_STEPS = 10
STEPS = "steps.jsonl"


def train_loop(job: dict[str, Any]) -> None:
    """Train in one worker."""
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, available_cores() // context.get_local_world_size()))
    config, dataset = PretrainConfig.model_validate(job["config"]), open_dataset(job["data"])
    attempt, worker = time.time_ns(), Worker(Group(device, fixed=dist.group.WORLD))

    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    model = MAE(config.model).to(device, dtype)
    optimizer = adamw(model, config.optim)
    start = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"), map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    trained = compile_first(wrap_for_training(model, config, worker), job["compile_s"])

    order = make_order(config, dataset)
    total = round(config.epochs * order.steps_per_epoch)
    decoder = make_decoder(config.data.decoder, config.model.size, torch.get_num_threads(), device)
    loader = Loader(dataset, order, decoder, rank, world_size)
    with open(Path(job["out"], STEPS) if rank == 0 else os.devnull, "a") as rows:
        for batch in loader.steps(start, total):
            lr = learning_rate(batch.step, total, order.steps_per_epoch, config.global_batch, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums = pretrain_step(trained, optimizer, batch, config, worker)
            loss = float(sums[0]) / config.global_batch
            row = {"attempt": attempt, "step": batch.step, "world_size": world_size, "loss": loss}
            print(json.dumps(row), file=rows, flush=True)
            done = batch.step + 1
            if done % EVERY_STEPS == 0 or done == total:
                with tempfile.TemporaryDirectory() as folder:
                    checkpoint = None
                    if rank == 0:
                        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                        torch.save(state | {"step": done}, Path(folder, "state.pt"))
                        checkpoint = Checkpoint.from_directory(folder)
                    ray.train.report({"loss": loss}, checkpoint=checkpoint)
    loader.close()


def main() -> None:
    recipe, data, out, compile_s = sys.argv[1:]
    config = fix_order(load_config(PretrainConfig, recipe), open_dataset(data))
    out = str(Path(out).resolve())
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "config": config.model_dump(),
            "data": str(Path(data).resolve()),
            "out": out,
            "compile_s": float(compile_s),
        },
        scaling_config=ScalingConfig(num_workers=(1, 3)),
        run_config=RunConfig(
            name="stock", storage_path=f"{out}/ray", failure_config=FailureConfig(max_failures=-1)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
