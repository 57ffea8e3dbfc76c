"""Ray Train around a training loop of trainer/.

Checkpoints are the trainer's own (DESIGN.md, State): Ray starts the workers, joins them into a process
group, and tells what became of them.
"""

import logging
import os
import shutil
import socket
from typing import Any
from urllib.parse import urlsplit

import click
import ray
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from cluster.console import Mailbox, MailboxHandler, watch
from pipeline.decode import available_cores
from pipeline.errors import UserError
from pipeline.manifest import open_dataset
from pipeline.storage import open_store
from trainer.config import PretrainConfig
from trainer.pretrain import pretrain
from trainer.run import Run, begin_attempt, make_order, open_run

RAY_FOLDER = "ray"  # in the run folder: what Ray's controller keeps


# The controller looks at its workers this often, so a run's start and end take seconds less than with Ray's 2.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def train(config: PretrainConfig, data: str, out: str, console: Console) -> None:
    """Pre-train on Ray: on the cluster of RAY_ADDRESS, or else on a Ray embedded in this process.

    UserError for what only a person can mend, wherever it happened.
    """
    dataset = open_dataset(data)
    config, run = open_run(out, config, dataset)
    order = make_order(config, dataset)
    order_note = f"global batch {config.global_batch}, {config.data.lanes} lanes, block {config.data.block}"
    console.print(
        f"run {run.run_id[:8]} attempt {run.attempt}: {dataset.samples:,} samples, {order_note}, "
        f"{config.workers} workers → {run.store.url}"
    )
    if (imbalance := order.imbalance(config.workers)) > 1.1:
        console.print(
            f"warning: {config.workers} workers share {order.lanes} lanes unevenly: the busiest has "
            f"{imbalance:.2f} times the mean. Better is a number of workers that divides the lanes",
            style="yellow",
        )
    try:
        _start_ray(config.workers)
        begin_attempt(config, run, dataset)
        _fit(config, dataset.store.url, run, console)
    finally:
        ray.shutdown()


def _start_ray(workers: int) -> None:
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        _check_reachable(address)
        ray.init(address=address, **options)
    else:
        cores = max(available_cores(), workers)
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            object_store_memory=128 * 2**20,
            **options,
        )
    have = ray.cluster_resources()
    if have.get("CPU", 0) < workers:
        raise UserError(
            f"{workers} workers need as many CPUs, the cluster has {have.get('CPU', 0):g}: lower workers"
        )
    if 0 < have.get("GPU", 0) < workers:
        raise UserError(f"{workers} workers need a GPU each, the cluster has {have['GPU']:g}: lower workers")


def _check_reachable(address: str) -> None:
    """UserError where nothing listens at host:port or ray://host:port; Ray itself would try for many minutes."""
    target = urlsplit(address if "://" in address else f"ray://{address}")
    if target.hostname and target.port:
        try:
            socket.create_connection((target.hostname, target.port), timeout=10).close()
        except OSError as error:
            raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None


def _fit(config: PretrainConfig, data: str, run: Run, console: Console) -> None:
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(),
            "data": data,
            "out": run.store.url,
            "run_id": run.run_id,
            "attempt": run.attempt,
            "mailbox": mailbox,
        },
        scaling_config=ray.train.ScalingConfig(num_workers=config.workers, use_gpu=gpus),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name=f"attempt-{run.attempt:04d}",
            storage_path=run.store.path(RAY_FOLDER),
            storage_filesystem=None if run.store.is_local else PyFileSystem(FSSpecHandler(run.store.fs)),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with watch(mailbox, console):
            trainer.fit()
    except SystemExit:  # Ray's answer to Ctrl-C
        console.print("interrupted: the same command again goes on from the last commit")
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        if cause := _user_error(error):
            raise cause from None
        raise click.ClickException(f"{error}\nThe same command again goes on from the last commit.") from None
    finally:
        run.store.remove(run.store.names(RAY_FOLDER))
        if run.store.is_local:
            shutil.rmtree(run.store.path(RAY_FOLDER), ignore_errors=True)


def _user_error(error: ray.train.TrainingFailedError) -> UserError | None:
    """What only a person can mend, if that is what stopped a worker."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return UserError(str(cause).strip())
            cause = getattr(cause, "cause", None) or cause.__cause__
    return None


def _worker(job: dict[str, Any]) -> None:
    """One worker: runs in a process of its own, somewhere in the cluster."""
    context = ray.train.get_context()
    log = logging.getLogger("maestream")
    log.addHandler(MailboxHandler(job["mailbox"]))
    device = ray.train.torch.get_device()
    # Ray allows one thread; the machine's cores are shared among its workers.
    torch.set_num_threads(max(1, available_cores() // context.get_local_world_size()))
    run = Run(
        open_store(job["out"], known=True),
        job["run_id"],
        job["attempt"],
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
        on_metrics=lambda row: job["mailbox"].put.remote(row),
    )
    pretrain(PretrainConfig.model_validate(job["config"]), open_dataset(job["data"], known=True), run)
