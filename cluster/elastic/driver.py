"""Run a training loop of trainer/ on Ray Train.

Ray starts the workers, joins them into a process group and reports failures. Checkpoints are written by
trainer.run.checkpoint: Ray's checkpoint manager is not used.
"""

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
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from cluster.elastic.failures import (
    describe,
    find_user_error,
    is_infrastructure_failure,
    workers_stopped,
)
from cluster.elastic.mailbox import Mailbox
from cluster.elastic.scaling import ElasticTrainer, OwnGroups
from cluster.elastic.worker_process import run_worker
from cluster.runtime.session import check_reachable, connect, explain_import_errors
from cluster.terminal.live_status import live_status
from pipeline.cpus import available_cores
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.errors import UserError
from pipeline.text import plural
from trainer.config.schema import FinetuneConfig, LabelledRunConfig, PretrainConfig, RunConfig, WorkersConfig
from trainer.group.roster import Roster
from trainer.labels.labels import check_val, labels_of_run, measure_labels
from trainer.models.pixels import check_pixels, describe_normalisation
from trainer.run.checkpoint import newest_checkpoint
from trainer.run.events import Events
from trainer.run.lease import Lease
from trainer.run.run import Run, create_run, make_order, open_run, pop_failure, write_failure
from trainer.train.finetune import check_mixing
from trainer.weights.init import resolve_start

RAY_FOLDER = "ray"  # in the run folder: files of Ray's controller
MAX_IMBALANCE = 1.1  # busiest worker's share of the lanes over the mean share; a warning is printed above it

# Ray's default timeouts are made for slower jobs: with them, a killed node cost 76 s and 27 steps (measured).
RAY_SETTINGS = {
    # The controller checks its workers this often (default: 2 s), so it notices lost workers sooner.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # A worker that does not answer is stuck (SIGSTOP, a hung driver) and not busy: it answers in a thread of its own.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "4",
    # Workers start within seconds, unless their node is gone and Ray has not noticed yet.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # Our scaling policy reacts to preemption notices.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
for name, value in RAY_SETTINGS.items():
    os.environ.setdefault(name, value)
CHECK_INS = 16  # at the same time, besides two per worker


def train(config: RunConfig, data: str, out: str, console: Console, ledger: bool = False) -> None:
    """Pre-train, fine-tune or probe on Ray: on the cluster at RAY_ADDRESS, or on a Ray started in this process.

    Args:
        config: of the run.
        data: URL or folder of the dataset.
        out: URL or folder of the run; an existing run is resumed.
        console: where progress and events are printed.
        ledger: whether metrics list the sample ids of each step.

    Raises:
        UserError: for errors that the user has to fix, on whichever machine they occurred.
        click.ClickException: if the workers failed repeatedly without progress.
        KeyboardInterrupt: if SIGINT or SIGTERM stopped the run.
    """
    dataset = open_dataset(data)
    config, run = _open(out, config, dataset)  # refuse invalid input before anything is written
    if address := os.environ.get("RAY_ADDRESS"):
        check_reachable(address)
    # If the lease is lost, this process interrupts itself.
    with Lease(run.store, console.print, lambda: os.kill(os.getpid(), signal.SIGINT)) as lease:
        config, run = _open(out, config, dataset)  # again: another process may have owned the run until now
        run = replace(run, owner=lease.owner)
        try:
            _train(config, dataset, run, ledger, lease, console)
        except UserError as error:
            if not lease.lost:
                with suppress(UserError, OSError):  # the error is printed even if it cannot be recorded
                    write_failure(run, str(error))
            raise
        except KeyboardInterrupt:
            if lease.lost:
                raise UserError(
                    f"another process has taken over {run.store.url}: this process stopped"
                ) from None
            raise


def _open(out: str, config: RunConfig, dataset: Dataset) -> tuple[RunConfig, Run]:
    """Open or prepare the run at `out`, check its datasets, and resolve what depends on `init` and the images on the first attempt."""
    config, run = open_run(out, config, dataset)
    if run.attempt == 1:
        config = resolve_start(config, dataset)
    val = None
    if isinstance(config, LabelledRunConfig):
        val = open_dataset(config.data.val) if config.data.val else None
        labels = measure_labels(dataset) if run.attempt == 1 else labels_of_run(run.store, dataset)
        check_val(dataset, val)
        if isinstance(config, FinetuneConfig):
            check_mixing(config, labels)
    if isinstance(config, PretrainConfig) and config.knn:
        val = open_dataset(config.knn.val)
        check_val(dataset, val)
    if val is not None:
        check_pixels(config.model, val)
    return config, run


def _train(
    config: RunConfig, dataset: Dataset, run: Run, ledger: bool, lease: Lease, console: Console
) -> None:
    order = make_order(config, dataset)
    lanes = f"{plural(order.lanes, 'lane')}, block {config.data.block}"
    console.print(
        f"run {run.run_id[:8]} attempt {run.attempt}: {plural(dataset.samples, 'sample')}, "
        f"global batch {config.global_batch}, {lanes}, {_worker_range(config.workers)} → {run.store.url}"
    )
    console.print(describe_normalisation(config.model))
    workers = config.workers.max
    if (imbalance := order.imbalance(workers)) > MAX_IMBALANCE:
        console.print(
            f"warning: {plural(order.lanes, 'lane')} cannot be shared evenly by {plural(workers, 'worker')}: the busiest "
            f"worker has {imbalance:.2f} times the mean load. Choose a number of workers that divides the number of lanes",
            style="yellow",
        )
    if reason := pop_failure(run.store):
        console.print(f"the previous attempt failed: {reason}", style="yellow")
    wanted = _worker_range(config.workers)
    started = f"{wanted} on the Ray cluster" if os.environ.get("RAY_ADDRESS") else f"Ray and {wanted}"
    console.print(f"starting {started} …")  # takes up to a minute
    try:
        _start_ray(config.workers, console)
        create_run(config, run, dataset)
        with explain_import_errors():
            _fit(config, dataset.store.url, run, ledger, lease, console)
    finally:
        ray.shutdown()


def _worker_range(workers: WorkersConfig) -> str:
    """Return "2 workers" or "1 to 4 workers"."""
    return ("" if workers.min == workers.max else f"{workers.min} to ") + plural(workers.max, "worker")


def _start_ray(workers: WorkersConfig, console: Console) -> None:
    connect(max(available_cores(), workers.max))
    address = os.environ.get("RAY_ADDRESS")
    gpus = ray.cluster_resources().get("GPU", 0)
    if not address and 0 < gpus < workers.min:
        raise UserError(
            f"{workers.min} workers need one GPU each, but this machine has {gpus:g}: reduce `workers` in the config"
        )
    if address and not gpus:
        console.print("the cluster has no GPU at the moment: the workers use CPUs")


def _fit(config: RunConfig, data: str, run: Run, ledger: bool, lease: Lease, console: Console) -> None:
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=this_node)(Mailbox).remote(run.run_id[:8])
    workers = config.workers
    # Each worker that waits at the roster takes one of its threads.
    threads = 2 * workers.max + CHECK_INS
    roster = ray.remote(num_cpus=0, max_concurrency=threads, scheduling_strategy=this_node)(Roster).remote()
    trainer = ElasticTrainer(
        run_worker,
        run_id=run.run_id,
        mailbox=mailbox,
        roster=roster,
        train_loop_config={
            "config": config.model_dump(),
            "data": data,
            "out": run.store.url,
            "run_id": run.run_id,
            "ledger": ledger,
            "owner": run.owner,
            "mailbox": mailbox,
            "roster": roster,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.max if workers.min == workers.max else (workers.min, workers.max),
            use_gpu=gpus,
        ),
        torch_config=OwnGroups(),
        run_config=ray.train.RunConfig(
            name=f"attempt-{run.attempt:04d}",
            storage_path=run.store.path(RAY_FOLDER),
            storage_filesystem=None if run.store.is_local else PyFileSystem(FSSpecHandler(run.store.fs)),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with live_status(mailbox, console, Events(run).append), _stop_on_signal(mailbox, lease, console):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        if workers_stopped(error):
            console.print(_stop_message(run, ray.get(mailbox.steps_done.remote())))
            raise KeyboardInterrupt from None
        raise _explain(error) from None
    finally:
        if not lease.lost:
            with suppress(UserError, OSError):  # files that are left behind do no harm
                run.store.remove(run.store.names(RAY_FOLDER))
            if run.store.is_local:
                shutil.rmtree(run.store.path(RAY_FOLDER), ignore_errors=True)


def _stop_message(run: Run, steps: int) -> str:
    """Say at which step the run stopped, and where it will resume."""
    committed = newest_checkpoint(run.store)
    if committed >= steps:
        return f"stopped after step {committed}, with a checkpoint: run the same command again to resume"
    return (
        f"stopped after step {steps}; the last checkpoint is of step {committed}: run the same command again to resume "
        "from it, or from a newer snapshot if a machine still has one"
    )


@contextmanager
def _stop_on_signal(mailbox: Any, lease: Lease, console: Console) -> Iterator[None]:
    """Stop the workers on SIGINT (Ctrl-C) and SIGTERM (`ray job stop`) after they saved their state.

    A second signal stops at once. `ray.init` installs signal handlers of its own, so these must be installed after it.
    """
    stopping = False

    def handle(*_: object) -> None:
        nonlocal stopping
        if stopping or lease.lost:
            raise KeyboardInterrupt
        stopping = True
        mailbox.request_stop.remote()
        console.print("stopping: the workers save their state first (repeat to stop at once)")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _explain(error: ray.train.TrainingFailedError) -> Exception:
    """Return the exception that tells the user why the run failed."""
    if fixable := find_user_error(error):
        return fixable
    cause = describe(error)
    # If no worker died it is a bug in maestream or Ray, and the traceback helps to find it.
    details = "" if is_infrastructure_failure(error) else f"\n{error}"
    return click.ClickException(
        f"{cause}{details}\nRun the same command again to resume from the last checkpoint."
    )
