"""Ray Train around a training loop of trainer/.

Checkpoints are the trainer's own (DESIGN.md, State): Ray starts the workers, joins them into a process
group, and tells what became of them.
"""

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import click
import ray
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train.torch import TorchConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from cluster import notice
from cluster.connect import check_reachable, connect
from cluster.console import Mailbox, MailboxHandler, watch
from cluster.elastic import ElasticTrainer, wish_of_this_worker
from cluster.failures import Left, describe, has_left, is_of_machines, user_error
from pipeline.cores import available_cores
from pipeline.errors import UserError
from pipeline.manifest import Dataset, open_dataset
from pipeline.storage import open_store
from trainer.checkpoint import newest_commit
from trainer.config import LabelledRunConfig, PretrainConfig, RunConfig, WorkersConfig
from trainer.evaluate import check_classes
from trainer.events import Events
from trainer.initial import fix_init
from trainer.lease import Lease
from trainer.recipe import KINDS
from trainer.run import Run, forget_failure, found_run, make_order, open_run, write_failure
from trainer.tasks import LOOPS

RAY_FOLDER = "ray"  # in the run folder: what Ray's controller keeps


# Ray's own patience is made for slower things than these (measured: 76 s and 27 steps for a killed node without):
TUNING = {
    # the controller looks at its workers this often, not each 2 s: a death, a start and an end are seen sooner
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # a worker that does not answer is stuck (SIGSTOP, a hung driver), not busy: it has threads for that
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
    # workers start in seconds, or their node is gone and Ray does not know yet
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # a node's notice is acted upon by our scaling policy
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
for name, value in TUNING.items():
    os.environ.setdefault(name, value)
# For all of the job's processes: a process group that has lost a member cannot be ended in order, so not for long (Ray waits 30 s).
WORKER_ENVIRONMENT = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3"}


def train(config: RunConfig, data: str, out: str, console: Console, ledger: bool = False) -> None:
    """Pre-train, fine-tune or probe on Ray: on the cluster of RAY_ADDRESS, or else on a Ray embedded in this process.

    With `ledger` the metrics name the samples of each step. UserError for what only a person can mend, wherever it
    happened. KeyboardInterrupt if the run was told to stop, by SIGINT or SIGTERM.
    """
    dataset = open_dataset(data)
    config, run = _open(out, config, dataset)  # what has to be refused is, before anything is written
    if address := os.environ.get("RAY_ADDRESS"):
        check_reachable(address)
    # A lease that is lost interrupts this process.
    with Lease(run.store, console.print, lambda: os.kill(os.getpid(), signal.SIGINT)) as lease:
        config, run = _open(out, config, dataset)  # another owner may have been at it until now
        run = replace(run, ledger=ledger, owner=lease.owner)
        try:
            _train(config, dataset, run, lease, console)
        except UserError as error:
            if not lease.lost:
                with suppress(UserError, OSError):  # if it cannot be written, it is still said
                    write_failure(run, str(error))
            raise
        except KeyboardInterrupt:
            if lease.lost:
                raise UserError(
                    f"somebody else has taken {run.store.url} over: this one has stopped"
                ) from None
            raise


def _open(out: str, config: RunConfig, dataset: Dataset) -> tuple[RunConfig, Run]:
    config, run = open_run(out, config, dataset)
    if isinstance(config, LabelledRunConfig):
        check_classes(dataset, open_dataset(config.data.val) if config.data.val else None)
    if isinstance(config, PretrainConfig) and config.knn:
        check_classes(dataset, open_dataset(config.knn.val))
    return (fix_init(config) if run.attempt == 1 else config), run


def _train(config: RunConfig, dataset: Dataset, run: Run, lease: Lease, console: Console) -> None:
    order = make_order(config, dataset)
    order_note = f"global batch {config.global_batch}, {config.data.lanes} lanes, block {config.data.block}"
    console.print(
        f"run {run.run_id[:8]} attempt {run.attempt}: {dataset.samples:,} samples, {order_note}, "
        f"{_how_many(config.workers)} workers → {run.store.url}"
    )
    if (imbalance := order.imbalance(config.workers.max)) > 1.1:
        console.print(
            f"warning: {config.workers.max} workers share {order.lanes} lanes unevenly: the busiest has "
            f"{imbalance:.2f} times the mean. Better is a number of workers that divides the lanes",
            style="yellow",
        )
    if reason := forget_failure(run.store):
        console.print(f"the last time it stopped, because {reason}", style="yellow")
    try:
        _start_ray(config.workers, console)
        found_run(config, run, dataset)
        _fit(config, dataset.store.url, run, lease, console)
    finally:
        ray.shutdown()


def _how_many(workers: WorkersConfig) -> str:
    return f"{workers.max}" if workers.min == workers.max else f"{workers.min} to {workers.max}"


def _start_ray(workers: WorkersConfig, console: Console) -> None:
    connect(max(available_cores(), workers.max), WORKER_ENVIRONMENT)
    address = os.environ.get("RAY_ADDRESS")
    gpus = ray.cluster_resources().get("GPU", 0)
    if not address and 0 < gpus < workers.min:
        raise UserError(f"{workers.min} workers need a GPU each, this machine has {gpus:g}: lower workers")
    if address and not gpus:
        console.print("the cluster has no GPU now, so the workers will use CPUs")


def _fit(config: RunConfig, data: str, run: Run, lease: Lease, console: Console) -> None:
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote(run.run_id[:8])
    workers = config.workers
    trainer = ElasticTrainer(
        _worker,
        run_id=run.run_id,
        mailbox=mailbox,
        train_loop_config={
            "config": config.model_dump(),
            "data": data,
            "out": run.store.url,
            "run_id": run.run_id,
            "ledger": run.ledger,
            "owner": run.owner,
            "mailbox": mailbox,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.max if workers.min == workers.max else (workers.min, workers.max),
            use_gpu=gpus,
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name=f"attempt-{run.attempt:04d}",
            storage_path=run.store.path(RAY_FOLDER),
            storage_filesystem=None if run.store.is_local else PyFileSystem(FSSpecHandler(run.store.fs)),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with watch(mailbox, console, Events(run).keep), _asked_to_stop(mailbox, lease, console):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        if has_left(error):
            console.print(_where_it_stopped(run, ray.get(mailbox.steps.remote())))
            raise KeyboardInterrupt from None
        raise _explained(error) from None
    finally:
        if not lease.lost:
            with suppress(UserError, OSError):  # what is left of it does no harm
                run.store.remove(run.store.names(RAY_FOLDER))
            if run.store.is_local:
                shutil.rmtree(run.store.path(RAY_FOLDER), ignore_errors=True)


def _where_it_stopped(run: Run, steps: int) -> str:
    committed = newest_commit(run.store)
    if committed >= steps:
        return f"stopped after step {committed}, and committed: the same command again goes on from there"
    return (
        f"stopped after step {steps}; the last commit is of step {committed}, so the same command again goes on from "
        "there, or from what the machines still have of later steps"
    )


@contextmanager
def _asked_to_stop(mailbox: Any, lease: Lease, console: Console) -> Iterator[None]:
    """SIGINT (Ctrl-C) and SIGTERM (`ray job stop`) let the workers save their work and leave; a second one ends all at
    once. Ray has handlers of its own, so these come after `ray.init`."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked or lease.lost:
            raise KeyboardInterrupt
        asked = True
        mailbox.stop.remote()
        console.print("asked to stop: the workers save their work first (again: at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explained(error: ray.train.TrainingFailedError) -> Exception:
    """What a person is told of what stopped a run."""
    if mendable := user_error(error):
        return mendable
    cause = describe(error)
    # Unless a worker died it is a mistake of ours, or of Ray: then it is of interest where it lies.
    details = "" if is_of_machines(error) else f"\n{error}"
    return click.ClickException(f"{cause}{details}\nThe same command again goes on from the last commit.")


def _worker(job: dict[str, Any]) -> None:
    """One worker: runs in a process of its own, somewhere in the cluster."""
    context, mailbox = ray.train.get_context(), job["mailbox"]
    log = logging.getLogger("maestream")
    log.addHandler(MailboxHandler(mailbox))
    node = ray.get_runtime_context().get_node_id()
    if context.get_local_rank() == 0:
        notice.watch(node, log.warning)
    device = ray.train.torch.get_device()
    # Ray allows one thread; the machine's cores are shared among its workers.
    torch.set_num_threads(max(1, available_cores() // context.get_local_world_size()))
    run = Run(
        open_store(job["out"], known=True),
        job["run_id"],
        attempt=0,  # `trainer.loop.train` begins one
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        node=node,
        device=device,
        ledger=job["ledger"],
        owner=job["owner"],
        wish=wish_of_this_worker,
        on_metrics=lambda row: mailbox.put.remote(row),
        on_event=lambda event: mailbox.tell.remote(event),
        on_begin=lambda *begun: mailbox.begin.remote(*begun),
        on_step=lambda steps: mailbox.reach.remote(steps),
    )
    dataset = open_dataset(job["data"], known=True)
    config = KINDS[job["config"]["task"]].model_validate(job["config"])
    if not LOOPS[config.task](config, dataset, run):
        raise Left
