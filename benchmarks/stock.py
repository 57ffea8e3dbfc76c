"""Stock Ray Train at the work of `maestream pretrain`: the other side of benchmarks.elasticity.

    python -m benchmarks.stock CONFIG DATA OUT

Written as Ray's documentation writes it: model and optimizer through a checkpoint that rank 0 reports each EVERY_STEPS
steps with `ray.train.report`, which also tells where to go on. One to three workers, any number of failures; all else
is as Ray has it. Model, batches, optimizer step and learning rate are ours, so that a step costs the same.

OUT/steps.jsonl gets a row a step; OUT/ray/ is Ray's.
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
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipeline.cores import available_cores
from pipeline.decode import make_decoder
from pipeline.loader import Loader
from pipeline.manifest import open_dataset
from pipeline.storage import open_store
from trainer.config import PretrainConfig
from trainer.loop import Pending, gather
from trainer.mae import MAE
from trainer.optim import adamw, learning_rate
from trainer.pretrain import pretrain_step
from trainer.recipe import load_config
from trainer.run import Run, fix_order, make_order

EVERY_STEPS = 10
STEPS = "steps.jsonl"


def train_loop(job: dict[str, Any]) -> None:
    """One worker."""
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, available_cores() // context.get_local_world_size()))
    config, dataset = PretrainConfig.model_validate(job["config"]), open_dataset(job["data"])
    run = Run(open_store(job["out"]), "stock", time.time_ns(), rank, world_size, device=device)

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
    trained = ray.train.torch.prepare_model(model)

    order = make_order(config, dataset)
    total = round(config.epochs * order.steps_per_epoch)
    decoder = make_decoder(config.data.decoder, config.model.size, torch.get_num_threads(), device)
    loader = Loader(dataset, order, decoder, rank, world_size)
    with open(Path(job["out"], STEPS) if rank == 0 else os.devnull, "a") as rows:
        for batch in loader.steps(start, total):
            lr = learning_rate(batch.step, total, order.steps_per_epoch, config.global_batch, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums = pretrain_step(trained, optimizer, batch, config, run)
            pending = [Pending(batch.step, batch.epoch, lr, batch.wait_s, batch.sample_ids, sums)]
            losses, _ = gather(pending, config.global_batch, run)
            row = {"attempt": run.attempt, "step": batch.step, "world_size": world_size, "loss": losses[0]}
            print(json.dumps(row), file=rows, flush=True)
            done = batch.step + 1
            if done % EVERY_STEPS == 0 or done == total:
                with tempfile.TemporaryDirectory() as folder:
                    checkpoint = None
                    if rank == 0:
                        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                        torch.save(state | {"step": done}, Path(folder, "state.pt"))
                        checkpoint = Checkpoint.from_directory(folder)
                    ray.train.report({"loss": losses[0]}, checkpoint=checkpoint)
    loader.close()


def main() -> None:
    recipe, data, out = sys.argv[1:]
    config = fix_order(load_config(PretrainConfig, recipe), open_dataset(data))
    out = str(Path(out).resolve())
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"config": config.model_dump(), "data": str(Path(data).resolve()), "out": out},
        scaling_config=ScalingConfig(num_workers=(1, 3)),
        run_config=RunConfig(
            name="stock", storage_path=f"{out}/ray", failure_config=FailureConfig(max_failures=-1)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
