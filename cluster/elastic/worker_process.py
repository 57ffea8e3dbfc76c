"""What runs in a worker's process: the training, and what Ray's controller tells the worker meanwhile."""

import logging
import threading
from typing import Any

import ray
import ray.train
import torch

from cluster.elastic import preemption
from cluster.elastic.failures import WorkersStopped
from cluster.elastic.mailbox import MailboxHandler
from pipeline.cpus import available_cores
from pipeline.dataset.dataset import open_dataset
from pipeline.storage.store import open_store
from trainer.config.recipe import CONFIG_TYPES
from trainer.group.group import Group
from trainer.group.nccl import Nccl
from trainer.group.rendezvous import Address, Generation
from trainer.group.requests import Request
from trainer.growth import dataset_of_run
from trainer.run.run import Run
from trainer.run.worker import Callbacks, Upcoming, Worker
from trainer.train.registry import TRAIN_FUNCTIONS

_lock = threading.Lock()
_request = Request.NONE  # the highest that this worker was asked for
_change = False  # whether to form the next generation, once
_group: Group | None = None
_dead: set[str] = set()  # workers that were reported before there was a group


# ---- called by Ray's controller, in another thread than the training


def ask(request: Request) -> None:
    """Ask this worker to do something after its current step."""
    global _request, _change
    with _lock:
        if request is Request.CHANGE:
            _change = True
        else:
            _request = max(_request, request)


def report_lost(members: list[str]) -> None:
    """Tell this worker that others are lost, so that it does not wait for them."""
    with _lock:
        _dead.update(members)
        group = _group
    if group is not None:
        for member in members:
            group.interrupt(member)


def give_up(number: int) -> None:
    """Tell this worker that another has left generation `number`. NCCL does not notice it."""
    if _group is not None:
        _group.give_up(number)


def responds() -> bool:
    """Return True. Shows whether the process responds."""
    return True


# ---- the training


def next_request() -> Request:
    """Return what this worker was asked for. A request for the next generation is returned once."""
    global _change
    with _lock:
        change, _change = _change, False
        return max(_request, Request.CHANGE if change else Request.NONE)


class RayRendezvous:
    """The job's `trainer.group.roster.Roster`, which is a Ray actor on the driver's node."""

    def __init__(self, roster: Any) -> None:
        self.roster = roster

    def check_in(self, member: str, address: Address, leaving: bool) -> Generation | None:
        generation: Generation | None = ray.get(self.roster.check_in.remote(member, address, leaving))
        return generation

    def finish(self) -> None:
        ray.get(self.roster.finish.remote())


def upcoming(roster: Any, mailbox: Any, group: Group) -> Upcoming | None:
    """Return the next step, and the rank at which this worker may join those that train; None if it is one of the first."""
    status, step = ray.get([roster.status.remote(), mailbox.steps_done.remote()])
    if not group.changes or group.member in status.members:
        return None
    gone = [rank for rank, member in enumerate(status.members) if member in status.removed]
    size = len(status.members) + (not gone)
    return Upcoming(step + 1, gone[0] if gone else size - 1, size)


def run_worker(job: dict[str, Any]) -> None:
    """Train as one worker."""
    global _group
    context, mailbox = ray.train.get_context(), job["mailbox"]
    log = logging.getLogger("maestream")
    log.addHandler(MailboxHandler(mailbox))
    runtime = ray.get_runtime_context()
    node = runtime.get_node_id()
    if context.get_local_rank() == 0:
        preemption.watch(node, log.warning)
    device = ray.train.torch.get_device()
    # Ray sets one thread; share the machine's cores among its workers instead.
    torch.set_num_threads(max(1, available_cores() // context.get_local_world_size()))
    config = CONFIG_TYPES[job["config"]["task"]].model_validate(job["config"])
    group = Group(device)
    if config.workers.max > 1:
        backend = Nccl(device) if device.type == "cuda" else None
        name, host = runtime.get_actor_id(), ray.util.get_node_ip_address()
        group = Group(device, None, RayRendezvous(job["roster"]), name, host, backend)
    with _lock:
        _group, known = group, set(_dead)
    for member in known:
        group.interrupt(member)
    # Attempt 0: `trainer.train.loop.train` begins the next one.
    run = Run(open_store(job["out"], already_reached=True), job["run_id"], attempt=0, owner=job["owner"])
    worker = Worker(group, node, job["ledger"], reports=context.get_world_rank() == 0)
    callbacks = Callbacks(
        request=next_request,
        upcoming=lambda: upcoming(job["roster"], mailbox, group),
        on_attempt=lambda *attempt: mailbox.begin_attempt.remote(*attempt),
        on_step=lambda steps: mailbox.set_steps_done.remote(steps),
        on_metrics=lambda row: mailbox.put_metrics.remote(row),
        on_event=lambda event: mailbox.add_event.remote(event),
    )
    dataset = open_dataset(job["data"], already_reached=True)
    dataset = dataset_of_run(run.store, config, dataset)
    try:
        finished = TRAIN_FUNCTIONS[config.task](config, dataset, run, worker, callbacks)
    finally:
        group.close()
    if not finished:
        raise WorkersStopped
