"""The training loop, the same for all tasks and at any number of workers.

Step t trains on the same samples, with the same weights in the loss, at any world size: a worker's loss is the sum over its
samples times W / B (W workers, global batch B), so the mean over workers is the mean over the global batch.
"""

import math
import time

import torch
import torch.distributed as dist

from pipeline.dataset.dataset import Dataset
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.loading.loader import Loader
from trainer.config.schema import RunConfig
from trainer.growth import batches_of, grown_record, make_stretches, phases_of
from trainer.models.pixels import check_pixels, images_taken
from trainer.run.bad_samples import BadSamples
from trainer.run.checkpoint import Checkpointer, check_finite
from trainer.run.metrics import Metrics
from trainer.run.resume import resume
from trainer.run.run import Run, begin_attempt, make_order, read_record
from trainer.run.snapshot import Snapshots
from trainer.run.stop_vote import StopRequest, StopVote
from trainer.run.worker import Callbacks, Worker
from trainer.train.due import due_after, make_schedule
from trainer.train.optim import learning_rate
from trainer.train.pending import PendingStep, metric_rows, read_losses
from trainer.train.task import Task


def train(
    task: Task, config: RunConfig, dataset: Dataset, run: Run, worker: Worker, callbacks: Callbacks
) -> bool:
    """Train to the end of the config's epochs. Resumes as `trainer.run.resume` describes.

    Call it on every rank, with torch.distributed initialised if there are several. Returns whether the run is finished; if
    any rank gets a stop request (`Callbacks.stop_request`), all save their work and stop after the same step.
    Raises UserError on all ranks, before anything is written, if the loss is not finite.
    """
    model, optimizer = task.model, task.optimizer

    # ---- resume
    point = resume(run, worker, config, dataset.fingerprint, model, optimizer, task.begin)
    start, unsaved = point.step, point.rows
    run = begin_attempt(run, worker, start, lambda record: grown_record(record, config, dataset, start))
    phases = phases_of(read_record(run.store), config, dataset)
    is_main = worker.rank == 0
    if is_main:
        callbacks.on_attempt(run.attempt, start, worker.world_size)

    # ---- data, checkpoints and metrics
    threads = config.data.threads or torch.get_num_threads()  # this worker's share of the cores
    check_pixels(config.model, dataset)
    pixels = images_taken(config.model, dataset.manifest.pixels)
    decoder = make_decoder(config.data.decoder, task.image_size, threads, worker.device, pixels)

    def make_loader(dataset: Dataset) -> Loader:
        return Loader(
            dataset, make_order(config, dataset), decoder, worker.rank, worker.world_size, config.data.disk_cache,
            config.data.crop_area, config.data.crops, config.data.flips,
        )  # fmt: skip

    stretches = make_stretches(config, dataset, phases, start, make_loader)
    total_steps = stretches[-1].stop
    if is_main and len(phases) > 1 and phases[-1].first_step >= start:
        callbacks.on_event({"event": "grown", "step": phases[-1].first_step, "samples": dataset.samples})
    bad_samples = BadSamples(run, worker, dataset, config.data)
    checkpointer = Checkpointer(run, config, phases[-1].fingerprint)
    snapshots = Snapshots(run, worker, config, start)
    vote = StopVote(worker.world_size)
    optimizer.register_step_pre_hook(lambda *_: snapshots.wait_for_copy())
    metrics = Metrics(run) if is_main else None
    if metrics is not None:
        metrics.restore(unsaved)

    def save_checkpoint(step: int) -> None:
        assert metrics is not None
        check_finite(step, model)
        metrics.commit(step)
        checkpointer.save(step, model, optimizer)

    def report(step: int, results: dict[str, float]) -> dict[str, float]:
        if results and is_main:
            callbacks.on_event({"event": "evaluated", "step": step, **results})
        return results

    task.prepare(decoder)
    if is_main and start == 0:
        task.picture(0)

    # ---- the loop
    pending: list[PendingStep] = []
    step, finished, request = start, start == total_steps, StopRequest.NONE
    saved = 0  # steps in this attempt's newest checkpoint, on rank 0
    logged_at = saved_at = time.perf_counter()
    worker.timer.start(worker.device)
    for stretch, batch in batches_of(stretches):
        worker.timer.mark("data_wait")
        loader, shift = stretch.loader, stretch.shift
        schedule = make_schedule(
            config, stretch.steps_per_epoch, task.evaluate_every
        )  # counts steps as the order does
        lr = learning_rate(
            batch.step + shift,
            schedule.total_steps,
            stretch.steps_per_epoch,
            config.global_batch,
            config.optim,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        bad_samples.add(batch)
        sums = task.step(batch)
        pending.append(PendingStep(batch.step, batch.epoch, lr, batch.wait_s, batch.sample_ids, sums))
        step = batch.step + 1
        if is_main:
            callbacks.on_step(step)

        request = vote.cast(callbacks.stop_request())
        overdue = (
            is_main
            and time.perf_counter() - saved_at > config.checkpoint.every_minutes * 60
            and not checkpointer.busy
        )
        due = due_after(step + shift, schedule, request, snapshots.due(step), overdue)
        finished = due.finished
        if not due.log and step < stretch.stop:
            continue

        # ---- read the losses of all pending steps; every rank gets the same
        losses = read_losses(pending, config.global_batch, worker, loader.part_names)
        _check_losses(pending, losses.loss)
        if any(losses.bad):
            bad_samples.check()
        now = time.perf_counter()
        worker.timer.mark("other")
        rows = metric_rows(pending, losses, now - logged_at, config.global_batch, run.attempt, worker)
        rows[-1]["cache_hit_rate"] = loader.cache_hit_rate()
        pending.clear()

        # ---- evaluate
        rows[-1] |= report(step, task.results(wait=due.finished))
        if due.evaluate:
            rows[-1] |= report(step, task.evaluate(step))
        if due.finished:
            rows[-1] |= report(step, task.results(wait=True))
        logged_at = time.perf_counter()
        worker.timer.start(worker.device)

        # ---- log, and save
        unsaved += rows
        if metrics is not None:
            metrics.write(rows)
            extra = {"known_bad": len(bad_samples.known), "committed": checkpointer.committed}
            callbacks.on_metrics({**rows[-1], **extra, "total_steps": total_steps})
            worker.timer.mark("other")
            if due.checkpoint:
                save_checkpoint(step)
                saved, saved_at = step, now
            if due.picture:
                task.picture(step)
        if due.stop:
            break
        if due.snapshot:
            snapshots.take(step, model, optimizer, unsaved, saved)
            unsaved = [row for row in unsaved if row["step"] >= snapshots.committed]
        worker.timer.mark("checkpoint")

    # ---- stop, or end
    if not finished:
        # A snapshot first: there may be no time left for a checkpoint.
        kept = snapshots.take_and_wait(step, model, optimizer, unsaved)
        if is_main and (request is StopRequest.SAVE or not kept) and saved != step:
            save_checkpoint(step)
    checkpointer.wait()
    if worker.world_size > 1:
        dist.barrier()  # a rank that exits earlier would end the others
    if finished or request is StopRequest.SAVE:
        snapshots.close()
    if metrics is not None:
        metrics.close(step)
    task.close()  # before the loader: it may use the decoder
    decoder.close()
    return finished


def _check_losses(pending: list[PendingStep], losses: list[float]) -> None:
    """Raise UserError if a loss is not finite."""
    for step, loss in zip(pending, losses, strict=True):
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step.step} (epoch {step.epoch}); the newest checkpoint is from before "
                "that step. Start a new run with a lower optim.blr or a longer warm-up"
            )
