"""The training loop: one plain loop, on one worker or many, wherever it runs, whatever is trained.

Whatever the world size, step t trains on the same samples with the same weight in the loss: a worker's loss
is the sum over its samples times W / B, so that the mean over workers is the mean over the global batch.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.decode import Decoder, Size, make_decoder
from pipeline.errors import UserError
from pipeline.loader import Batch, Loader, TrainBatch
from pipeline.manifest import Dataset
from trainer.bad_samples import BadSamples
from trainer.checkpoint import (
    Checkpointer,
    check_finite,
    check_state,
    load_optimizer,
    load_weights,
    newest_commit,
)
from trainer.config import RunConfig
from trainer.device import autocast, compiles
from trainer.laps import shares
from trainer.metrics import Metrics
from trainer.online_knn import OnlineKnn
from trainer.optim import learning_rate
from trainer.run import Run, begin_attempt, make_order
from trainer.snapshot import Snapshots, restore
from trainer.vote import Vote, Wish


@dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    model: nn.Module  # its state is what checkpoints have
    optimizer: torch.optim.Optimizer  # a group's "scale", if it has one, is of its learning rate
    size: Size  # of images
    step: Callable[[TrainBatch], torch.Tensor]  # one optimizer step; returns what `train_step` does
    begin: Callable[[], None] = lambda: None  # where there is nothing to go on from
    picture: Callable[[Decoder], Callable[[int], None]] | None = (
        None  # gives what draws one after a commit; rank 0
    )
    evaluate: Callable[[Decoder], dict[str, float]] | None = None  # on all ranks, which get the same
    knn: Callable[[Decoder], OnlineKnn] | None = None  # rank 0
    evaluate_every: float = 1.0  # epochs, of either


@dataclass(frozen=True)
class Pending:
    """A step whose numbers are still on the device."""

    step: int
    epoch: int
    lr: float
    wait_s: float
    sample_ids: torch.Tensor  # int64[n], of this worker
    sums: torch.Tensor  # see `train_step`


def train(task: Task, config: RunConfig, dataset: Dataset, run: Run) -> bool:
    """Train to the end of the config's epochs, from the newest snapshot or committed checkpoint if there is one.

    Call it on every rank, with torch.distributed initialised if there is more than one. Returns whether it came to the
    end: it leaves early, with all of its work saved, if any rank is told to (`Run.wish`).
    UserError, on all ranks and before anything is written, if the loss is not finite.
    """
    # ---- where we are
    model, optimizer = task.model, task.optimizer
    order = make_order(config, dataset)
    total_steps = max(1, round(config.epochs * order.steps_per_epoch))
    start = _newest_commit(run)
    if start:
        check_state(run.store, start, run, dataset.fingerprint, config)
    unsaved: list[dict[str, Any]] = []  # rows of metrics that are in no commit
    if found := restore(run, config, start, model, optimizer):
        start, unsaved = found
    elif start:
        load_weights(run.store, start, model)
        load_optimizer(run.store, start, model, optimizer)
    else:
        task.begin()
    run = begin_attempt(run, start)

    # ---- data, and where to report
    threads = config.data.threads or torch.get_num_threads()  # this worker's share of the cores
    decoder = make_decoder(config.data.decoder, task.size, threads, run.device)
    loader = Loader(
        dataset, order, decoder, run.rank, run.world_size, config.data.kept_part, config.data.crop_area,
        config.data.crops, config.data.flips,
    )  # fmt: skip
    bad_samples = BadSamples(run, dataset, config.data)
    leads = run.rank == 0
    checkpointer = Checkpointer(run, config, dataset.fingerprint)
    snapshots = Snapshots(run, config, start)
    vote = Vote(run.world_size)
    optimizer.register_step_pre_hook(lambda *_: snapshots.before_update())
    metrics = Metrics(run) if leads else None
    if metrics is not None:
        metrics.write(unsaved)

    picture = task.picture(decoder) if task.picture and leads else None
    knn = task.knn(decoder) if task.knn and leads else None

    def commit(step: int) -> None:
        assert metrics is not None
        check_finite(step, model)
        metrics.commit(step)
        checkpointer.save(step, model, optimizer)

    evaluate_steps = max(1, round(task.evaluate_every * order.steps_per_epoch))
    if picture and start == 0:
        picture(0)

    # ---- the loop
    pending: list[Pending] = []
    done, last = start, start == total_steps
    looked = committed_at = time.perf_counter()
    run.laps.start(run.device)
    committed = 0
    for batch in loader.steps(start, total_steps):
        run.laps.lap("data_wait")
        lr = learning_rate(batch.step, total_steps, order.steps_per_epoch, config.global_batch, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        bad_samples.see(batch)
        sums = task.step(batch)
        pending.append(Pending(batch.step, batch.epoch, lr, batch.wait_s, batch.sample_ids, sums))

        done = batch.step + 1
        if leads:
            run.on_step(done)
        last = done == total_steps
        due = config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0
        hot = snapshots.due(done) and not last
        leave = vote.cast(run.wish())
        judged = (task.evaluate or task.knn) is not None and (
            (done % evaluate_steps == 0 and not leave) or last
        )
        if not (done % config.log_every == 0 or due or hot or judged or last or leave):
            continue

        # ---- look at the device: every loss since the last look, the same on every rank
        losses, bad = gather(pending, config.global_batch, run)
        for seen, loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {seen.step} (epoch {seen.epoch}); the last commit is from before "
                    "that. Start a new run with a lower optim.blr or a longer warm-up"
                )
        if any(bad):
            bad_samples.look()
        now = time.perf_counter()
        run.laps.lap("other")
        rows = rows_of(pending, losses, bad, now - looked, config.global_batch, run)
        rows[-1]["cache_hit_rate"] = loader.cache_hit_rate()
        pending.clear()
        if judged and task.evaluate:
            rows[-1] |= tell(task.evaluate(decoder), done, run)
        if knn:
            rows[-1] |= tell(knn.found(wait=last), done, run)
            if judged:
                knn.begin(done, model)
            if last:
                rows[-1] |= tell(knn.found(wait=True), done, run)
        looked = time.perf_counter()
        run.laps.start(run.device)
        unsaved += rows
        if metrics is not None:
            metrics.write(rows)
            told = {"known_bad": len(bad_samples.known), "committed": checkpointer.committed}
            run.on_metrics({**rows[-1], **told, "total_steps": total_steps})
            run.laps.lap("other")
            # ---- commit
            overdue = now - committed_at > config.checkpoint.every_minutes * 60 and not checkpointer.busy
            if due or last or overdue:
                commit(done)
                if picture:
                    picture(done)
                committed, committed_at = done, now
        if leave and not last:
            break
        if hot:
            snapshots.take(done, model, optimizer, unsaved, committed)
            unsaved = [row for row in unsaved if row["step"] >= snapshots.committed]
        run.laps.lap("checkpoint")

    # ---- leave: at once, or at the end
    if not last:
        kept = snapshots.keep(done, model, optimizer, unsaved)  # also if there is no time left to commit
        if leads and (leave is Wish.SAVE or not kept) and committed != done:
            commit(done)
    checkpointer.wait()
    if run.world_size > 1:
        dist.barrier()  # who leaves first ends the others
    if last or leave is Wish.SAVE:
        snapshots.close()
    if metrics is not None:
        metrics.close(done)
    if knn:
        knn.close()  # it decodes, too
    loader.close()
    return last


def tell(found: dict[str, float], step: int, run: Run) -> dict[str, float]:
    """What an evaluation after `step` steps found, told to the console and the run's events."""
    if found and run.rank == 0:
        run.on_event({"event": "evaluated", "step": step, **found})
    return found


def _newest_commit(run: Run) -> int:
    """The step of the newest commit, 0 if there is none. Rank 0 looks, so that all ranks agree."""
    step = torch.tensor(newest_commit(run.store) if run.rank == 0 else 0, device=run.device)
    if run.world_size > 1:
        dist.broadcast(step, src=0)
    return int(step)


def micro_batches(batch: Batch, most: int, together: int = 1) -> list[slice]:
    """Parts of a batch, of at most so many samples each; so many neighbours stay together."""
    size = most // together * together
    return [slice(first, first + size) for first in range(0, len(batch.weights), size)]


def part_of(batch: Batch, rows: slice, device: torch.device) -> Batch:
    """Some samples of a batch, on the device."""
    images, labels, ids, weights = (
        tensor[rows].to(device, non_blocking=True)
        for tensor in (batch.images, batch.labels, batch.sample_ids, batch.weights)
    )
    return Batch(images, labels, ids, weights, {}, batch.spent)


def train_step(
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    config: RunConfig,
    run: Run,
    losses: Callable[[Batch, slice], torch.Tensor],
    together: int = 1,
) -> torch.Tensor:
    """One optimizer step. `losses` gives the loss of each sample of a micro-batch, by what is `trained`; it gets the
    micro-batch, on the device, and which samples of the batch it has. `together`: see `micro_batches`.

    Returns float64[2] on the device: the weighted sum of this worker's losses, and how many of its samples are bad.
    """
    parts = micro_batches(batch, config.at_once, together)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    for rows in parts:
        part = part_of(batch, rows, run.device)
        run.laps.lap("host_to_device")
        # Gradients are averaged over the workers once, with the last micro-batch.
        early = rows is not parts[-1] and run.world_size > 1
        with without_sync(trained) if early else nullcontext():
            with autocast(config, run.device):
                loss = (losses(part, rows) * part.weights).sum()
            (loss * (run.world_size / config.global_batch)).backward()
        run.laps.lap("step" if early or run.world_size == 1 else "all_reduce")
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    run.laps.lap("step")
    bad = (batch.weights == 0).sum().to(run.device, total.dtype, non_blocking=True)  # waits for nothing
    return torch.stack([total, bad])


def wrapped(model: nn.Module, config: RunConfig, run: Run) -> nn.Module:
    """What is called in training, so that gradients are averaged over the workers, and compiled where that pays."""
    trained = model
    if run.world_size > 1:
        trained = DistributedDataParallel(model, broadcast_buffers=False)
        group = trained.process_group

        def average(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            run.laps.lap("step")  # this far all-reduces of the buckets before were hidden
            return allreduce_hook(group, bucket)

        trained.register_comm_hook(None, average)
    # Shapes are static: a micro-batch, and what the last one of a batch has.
    return cast(nn.Module, torch.compile(trained, dynamic=False)) if compiles(config, run.device) else trained


def without_sync(trained: nn.Module) -> AbstractContextManager[None]:
    """Gradients stay this worker's own, of what `wrapped` gave for several."""
    return cast(DistributedDataParallel, trained).no_sync()


def rows_of(
    pending: list[Pending], losses: list[float], bad: list[int], took_s: float, global_batch: int, run: Run
) -> list[dict[str, Any]]:
    """Rows of metrics of pending steps, which took `took_s` seconds in all, with the shares that the parts of a step (see
    `trainer.laps`) have of them. Call it on every rank."""
    spent = shares(run.laps.take())
    rows: list[dict[str, Any]] = [
        {
            "attempt": run.attempt,
            "step": seen.step,
            "epoch": seen.epoch,
            "samples": (seen.step + 1) * global_batch,
            "loss": loss,
            "lr": seen.lr,
            "img_per_s": len(pending) * global_batch / took_s,
            "data_wait_s": seen.wait_s,
            "step_s": took_s / len(pending),
            "time": spent,
            "bad_samples": bad_count,
            "world_size": run.world_size,
        }
        for seen, loss, bad_count in zip(pending, losses, bad, strict=True)
    ]
    if run.ledger:
        for row, ids in zip(rows, gather_ids(pending, run), strict=True):
            row["sample_ids"] = ids
    return rows


def gather_ids(pending: list[Pending], run: Run) -> list[list[int]]:
    """The ids of all samples of each pending step, rank after rank."""
    own = torch.stack([seen.sample_ids for seen in pending]).to(run.device)
    if run.world_size == 1:
        return own.tolist()
    most = torch.tensor(own.shape[1], device=run.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    padded = F.pad(own, (0, int(most) - own.shape[1]), value=-1)  # a worker may have a lane less
    parts = [torch.empty_like(padded) for _ in range(run.world_size)]
    dist.all_gather(parts, padded)
    return [[i for i in ids if i >= 0] for ids in torch.cat(parts, dim=1).tolist()]


def gather(pending: list[Pending], global_batch: int, run: Run) -> tuple[list[float], list[int]]:
    """The global loss and the number of bad samples of each pending step, the same on every rank."""
    sums = torch.stack([seen.sums for seen in pending])
    if run.world_size > 1:
        dist.all_reduce(sums)
    return (sums[:, 0] / global_batch).tolist(), sums[:, 1].int().tolist()
