"""The training loop, the same for all tasks and at any number of workers.

Step t trains on the same samples, with the same weights in the loss, at any world size: the loss of a worker is the sum over its
samples divided by the global batch B, and losses and gradients are summed over the workers.

Workers may be lost, leave or join between any two steps, while the others keep their process, model and loader:

    a step ─▶ done by all ─▶ what is due after it ─▶ the next step
      │ WorkerLost: nothing has changed but gradients    │ a worker wants to join or leave: after the same step on all
      └──────────────────▶ `Team.regroup` ◀──────────────┘
                           1. form a group of those that are left and those that join
                           2. the worker that is furthest gives its state to those that are behind
                           3. begin a new attempt; take over what a lost rank 0 did
                           4. make batches of the lanes that are now this worker's
"""

import math
import time

import torch

from pipeline.dataset.dataset import Dataset
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.loading.loader import Loader
from trainer.config.schema import RunConfig
from trainer.group.rendezvous import WorkerLost
from trainer.group.requests import Request
from trainer.growth import Stretch, batches_of, make_stretches, stretches_from
from trainer.models.pixels import check_pixels, images_taken
from trainer.run.bad_samples import BadSamples
from trainer.run.run import Run, make_order
from trainer.run.snapshot import Snapshots
from trainer.run.worker import Callbacks, Worker
from trainer.step.optim import learning_rate
from trainer.train.due import due_after, make_schedule
from trainer.train.pending import PendingStep, gather_sample_ids, metric_rows, read_losses
from trainer.train.task import Task
from trainer.train.team import BAD, EVALUATE, Team
from trainer.train.warm_up import warm_up


def train(
    task: Task, config: RunConfig, dataset: Dataset, run: Run, worker: Worker, callbacks: Callbacks
) -> bool:
    """Train to the end of the config's epochs. Resumes as `trainer.run.resume` describes.

    Call it on every rank. If any rank gets Request.SAVE (`Callbacks.request`), all save their work and stop after the same
    step; then it returns False. It returns True if the run is finished, or if this worker has left it. Raises UserError on
    all ranks, before anything is written, if the loss is not finite.
    """
    model, optimizer, group = task.model, task.optimizer, worker.group

    # ---- what does not depend on the other workers
    threads = config.data.threads or torch.get_num_threads()  # this worker's share of the cores
    check_pixels(config.model, dataset)
    pixels = images_taken(config.model, dataset.manifest.pixels)
    decoder = make_decoder(config.data.decoder, task.image_size, threads, worker.device, pixels)
    task.prepare(decoder)
    snapshots = Snapshots(worker, config)
    optimizer.register_step_pre_hook(lambda *_: snapshots.wait_for_copy())
    bad_samples = BadSamples(run, worker, dataset, config.data)
    team = Team(task, config, dataset, run, worker, callbacks, bad_samples, snapshots)

    if group.changes:
        warm_up(task, config, dataset, decoder, worker)

    def stretches(step: int, rank: int, world_size: int) -> list[Stretch]:
        def make_loader(dataset: Dataset) -> Loader:
            return Loader(
                dataset, make_order(config, dataset), decoder, rank, world_size, config.data.disk_cache,
                config.data.crop_area, config.data.crops, config.data.flips,
            )  # fmt: skip

        return make_stretches(config, dataset, team.read_phases(), step, make_loader)

    if (
        upcoming := callbacks.upcoming()
    ):  # others train already: read ahead for the step at which this worker may join
        team.stretches = stretches(*upcoming)
        first = team.stretches[0]
        first.loader.prepare(first.begin + first.shift, first.stop + first.shift)
        first.loader.wait()

    # ---- meet the other workers, and resume
    if not team.regroup():
        return True
    progress = team.progress
    if team.stretches:
        team.stretches = stretches_from(team.stretches, progress.step)
    else:
        team.stretches = stretches(progress.step, worker.rank, worker.world_size)
    total_steps = team.stretches[-1].stop
    if team.records and progress.step == 0:
        task.picture(0)

    logged_at = time.perf_counter()

    def report(results: dict[str, float]) -> dict[str, float]:
        if results and team.records:
            callbacks.on_event({"event": "evaluated", "step": progress.step, **results})
        return results

    def regroup(leaving: bool) -> bool:
        nonlocal logged_at
        begin = time.perf_counter()
        member = team.regroup(leaving)
        logged_at += time.perf_counter() - begin  # the time is no part of a step
        worker.timer.mark("")
        return member

    # ---- the loop
    stopped = left = False
    worker.timer.start(worker.device)
    for stretch, batch in batches_of(team.stretches):  # after `regroup`, those of the step that is next
        worker.timer.mark("data_wait")
        loader, shift = stretch.loader, stretch.shift
        schedule = make_schedule(config, stretch.steps_per_epoch, task.evaluate_every)
        at, total = batch.step + shift, schedule.total_steps  # steps as the order counts them
        lr = learning_rate(at, total, stretch.steps_per_epoch, config.global_batch, config.optim)
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr * parameters.get("scale", 1.0)
        bad_samples.add(batch)
        asked = callbacks.request()
        leaving = asked is Request.LEAVE
        try:
            votes = team.vote.cast(asked, progress.saved)
            ids = gather_sample_ids(batch.sample_ids, worker) if worker.ledger else None
            sums = task.step(batch)
        except WorkerLost:
            left = not regroup(leaving)
            if left:
                break
            continue
        progress.add(PendingStep(
            team.run.attempt, worker.world_size, batch.step, batch.epoch, lr, batch.wait_s, sums, ids
        ), votes.saved)  # fmt: skip
        records = team.records
        if records:
            callbacks.on_step(progress.step)

        overdue = records is not None and records.overdue()
        due = due_after(at + 1, schedule, votes.request, snapshots.due(progress.step), overdue)
        if due.log or progress.step == stretch.stop:
            # ---- read the losses of all pending steps
            losses = read_losses(progress.pending, config.global_batch, loader.part_names)
            _check_losses(progress.pending, losses.loss)
            now = time.perf_counter()
            worker.timer.mark("other")
            rows = metric_rows(progress.pending, losses, now - logged_at, config.global_batch, worker)
            rows[-1]["cache_hit_rate"] = loader.cache_hit_rate()
            progress.read(rows)

            # ---- evaluate
            rows[-1] |= report(task.results(wait=due.finished))
            if due.meet:
                unsettled = (BAD if progress.bad else 0) | (EVALUATE if due.evaluate else 0)
                rows[-1] |= report(team.settle(unsettled))
                progress.bad = 0
            if due.finished:
                rows[-1] |= report(task.results(wait=True))
            logged_at = time.perf_counter()
            worker.timer.start(worker.device)

            # ---- log, and save
            if records:
                records.write(rows)
                extra = {"known_bad": len(bad_samples.known), "committed": records.checkpointer.committed}
                callbacks.on_metrics({**rows[-1], **extra, "total_steps": total_steps})
                worker.timer.mark("other")
                if due.checkpoint:
                    records.save(progress.step)
                    progress.saved = progress.step
                if due.picture:
                    task.picture(progress.step)
            if due.stop:
                stopped = True
                break
            if due.snapshot:
                snapshots.take(progress.step, model, optimizer, progress.unsaved)
            worker.timer.mark("checkpoint")
        if votes.request in (Request.CHANGE, Request.LEAVE):
            left = not regroup(leaving)
            if left:
                break

    # ---- stop, or end
    if stopped:
        # A snapshot first: there may be no time left for a checkpoint.
        snapshots.take_and_wait(progress.step, model, optimizer, progress.unsaved)
        if team.records and team.records.saved != progress.step:
            team.records.save(progress.step)
    if team.records and not left:
        team.records.close(progress.step)
    if not left:
        group.barrier()  # a worker that exits earlier would end the others
        if not stopped:
            group.finish()
    snapshots.close()
    task.close()  # before the loader: it may use the decoder
    decoder.close()
    return not stopped


def _check_losses(pending: list[PendingStep], losses: list[float]) -> None:
    """Raise UserError if a loss is not finite."""
    for step, loss in zip(pending, losses, strict=True):
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step.step} (epoch {step.epoch}); the newest checkpoint is from before "
                "that step. Start a new run with a lower optim.blr or a longer warm-up"
            )
