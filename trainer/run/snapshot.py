"""Snapshots: the newest state of a run, in the memory of each of its nodes.

While any worker is left, it has the state (`trainer.train.loop`). Snapshots are for the loss of all workers: from time to time
one worker of each node writes the state to a memory-backed folder of its node. When workers start, they agree on the newest
snapshot that any of their nodes still has, and one worker sends it to the others. So the loss of all workers costs some
seconds of training, not the minutes since the last checkpoint.

    FOLDER/maestream-<run id>/<node>/state.safetensors     tensors model/… and optimizer/… as in a checkpoint, and rows of
                                                          metrics; metadata: run id, attempt, step, config digest, checksum

A node has at most two of these files, one of them being written, and a copy of the state in the memory of the worker that
writes. The state of a ViT-B (weights and AdamW's two moments, float32) is 1.3 GB.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from crc32c import crc32c
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from trainer.config.recipe import fixed_values
from trainer.config.schema import RunConfig
from trainer.run.run import Run, in_history, read_starts
from trainer.run.transfer import from_bytes, load_state, send, state_of, to_bytes
from trainer.run.worker import Worker

STATE, WRITING = "state.safetensors", "writing"
# Largest share of a core's time that snapshots may take; steps get slower by 1.05 times as much (benchmarks/snapshots.py).
MAX_COST = 0.01
MIN_STEPS = 5  # steps between two snapshots, at least
ROWS = "rows"  # name of the tensor with the rows of metrics: JSON as uint8
ABANDONED_S = 3600  # snapshots of other runs that have not changed for this long are removed
Rows = list[dict[str, Any]]  # rows of metrics, see `trainer.run.metrics`
log = logging.getLogger("maestream")


def config_digest(config: RunConfig) -> str:
    """Hash the config values that must not change when a run resumes."""
    return hashlib.sha256(json.dumps(fixed_values(config), sort_keys=True).encode()).hexdigest()


class Snapshots:
    """Writes the snapshots of this worker's node, if this worker is the one that does. `begin` has to be called first."""

    def __init__(self, worker: Worker, config: RunConfig) -> None:
        self.worker, self.config, self.digest = worker, config, config_digest(config)
        self.run: Run | None = None
        self.nodes: set[int] = set()  # numbers of this attempt's nodes
        self.writes = False
        self.folder: Path | None = None
        self.next, self.last, self.last_at = 0, 0, 0.0  # steps; seconds
        self.host: dict[str, torch.Tensor] = {}  # the copy of the state that is written to the file
        self.copied: torch.cuda.Event | None = None
        self.cost_s = 0.0  # time that a snapshot takes from training, in seconds of a core
        self.thread: threading.Thread | None = None

    def begin(self, run: Run, nodes: Sequence[int], step: int) -> None:
        """Begin an attempt at step `step`. `nodes`: of each worker, see `node_number`."""
        self.run, self.nodes = run, set(nodes)
        before, self.writes = self.writes, is_first_on_its_node(self.worker.rank, nodes)
        if self.writes and not before:
            # The first comes at once: until then the loss of all workers costs all steps since the newest checkpoint.
            self.next, self.last, self.last_at = step + 1, step, time.perf_counter()
            self.folder = _folder(self.config, run, self.worker)
            if self.folder:
                _clear(self.folder.parent.parent, self.folder.parent)

    def due(self, step: int) -> bool:
        """Whether this worker takes a snapshot after `step` steps."""
        return self.writes and step >= self.next

    def take(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows) -> None:
        """Take a snapshot of the state after `step` steps. Skipped while the last one is still being written.

        Waits for the copy only if the model is on the CPU. The file is written in the background.

        Args:
            rows: metrics that are not in a checkpoint yet.
        """
        now, begin = time.perf_counter(), time.thread_time()
        if self.folder and not (self.thread and self.thread.is_alive()):
            self._copy(model, optimizer, rows)
            copy_s = time.thread_time() - begin
            self.thread = threading.Thread(target=self._write, args=(step, copy_s), name="snapshot")
            self.thread.start()
        step_s = (now - self.last_at) / max(step - self.last, 1)
        self.next = step + max(MIN_STEPS, math.ceil(self.cost_s / (MAX_COST * step_s)))
        self.last, self.last_at = step, now

    def take_and_wait(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows
    ) -> bool:
        """Take a snapshot after `step` steps and wait until it is written. Returns whether every node has it.

        Call it on every rank. Raises WorkerLost.
        """
        if self.thread is not None:
            self.thread.join()
        if self.writes and self.folder:
            self._copy(model, optimizer, rows)
            self._write(step, 0.0)
        has = torch.tensor(int(self.folder is not None or not self.writes))
        self.worker.group.all_reduce(has, dist.ReduceOp.MIN)
        return bool(has)

    def _copy(self, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows) -> None:
        state = state_of(model, optimizer)
        on_gpu = self.worker.device.type == "cuda"
        self.host[ROWS] = to_bytes(rows)
        for name, tensor in state.items():
            if name not in self.host:
                self.host[name] = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
        if not on_gpu:
            for name, tensor in state.items():
                self.host[name].copy_(tensor)
            return
        stream = torch.cuda.Stream(self.worker.device)
        stream.wait_stream(torch.cuda.current_stream(self.worker.device))
        with torch.cuda.stream(stream):
            for name, tensor in state.items():
                self.host[name].copy_(tensor, non_blocking=True)
            self.copied = stream.record_event()

    def wait_for_copy(self) -> None:
        """Make the device finish the copy. Call it before the optimizer changes the state."""
        if self.copied is not None:
            torch.cuda.current_stream(self.worker.device).wait_event(self.copied)

    def _write(self, step: int, copy_s: float) -> None:
        assert self.folder is not None
        assert self.run is not None
        begin = time.thread_time()
        try:
            if self.copied is not None:
                self.copied.synchronize()
            tags = {
                "run_id": self.run.run_id,
                "attempt": str(self.run.attempt),
                "step": str(step),
                "config": self.digest,
                "crc32c": str(state_checksum(self.host)),
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(self.host, self.folder / WRITING, tags)
            (self.folder / WRITING).replace(self.folder / STATE)
            self._clear_older()
        except (OSError, SafetensorError) as error:
            log.warning("no more snapshots in %s (%s): a failure now costs the steps since the last checkpoint",
                        self.folder, error)  # fmt: skip
            self._remove()
            self.folder = None
        # Training on a GPU continues during the writing; training on a CPU shares its cores with it.
        self.cost_s = copy_s + (time.thread_time() - begin if self.copied is None else 0)

    def _clear_older(self) -> None:
        """Remove snapshots of older attempts on this machine, unless their node takes part in this attempt.

        Ray gives a machine a new node name each time that Ray starts on it.
        """
        assert self.folder is not None
        assert self.run is not None
        for other in self.folder.parent.glob(f"*/{STATE}"):
            tags = read_tags(other)
            if (
                tags is not None
                and int(tags["attempt"]) < self.run.attempt
                and node_number(other.parent.name) not in self.nodes
            ):
                shutil.rmtree(other.parent, ignore_errors=True)

    def close(self) -> None:
        """Remove this node's snapshot: the run has ended, or is saved in a checkpoint."""
        if self.thread is not None:
            self.thread.join()
        self._remove()

    def _remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it has snapshots of other nodes on this machine
                self.folder.parent.rmdir()


def restore(
    run: Run,
    worker: Worker,
    config: RunConfig,
    nodes: Sequence[int],
    checkpoint: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, Rows] | None:
    """Load the newest snapshot on any worker's node, if it is newer than the checkpoint of step `checkpoint` (0: none).

    Call it on every rank. `nodes`: of each worker, see `node_number`. Returns the snapshot's step and rows of metrics, after `model` and `optimizer` of every rank have
    got its state; None if there is no such snapshot.
    """
    state: dict[str, torch.Tensor] = {}
    step = checkpoint
    if config.checkpoint.snapshots is not None and is_first_on_its_node(worker.rank, nodes):
        state, step = _newest(run, config, checkpoint)
    steps = [int(found) for found in worker.group.all_gather(torch.tensor([step]))]
    best = max(steps)
    if best <= checkpoint:
        return None
    state = send(state, steps.index(best), worker)
    rows = from_bytes(state.pop(ROWS))
    load_state(model, optimizer, state)
    return best, rows


def _newest(run: Run, config: RunConfig, checkpoint: int) -> tuple[dict[str, torch.Tensor], int]:
    """Read the newest intact snapshot on this machine that is in the run's history and newer than the checkpoint.

    Returns its tensors and its step; no tensors and the checkpoint's step if there is none.
    """
    assert config.checkpoint.snapshots is not None
    best: tuple[dict[str, torch.Tensor], int] = {}, checkpoint
    starts, digest = read_starts(run.store), config_digest(config)
    for path in Path(config.checkpoint.snapshots, f"maestream-{run.run_id}").glob(f"*/{STATE}"):
        # Damaged files, and files that are removed while they are read, are skipped. Each is opened only once: workers of
        # the previous attempt that are still alive may replace it.
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            tags = file.metadata() or {}
            if tags.get("run_id") != run.run_id or tags.get("config") != digest:
                continue
            step, attempt = int(tags["step"]), int(tags["attempt"])
            # The state after `step` steps includes the update of step - 1, counted from 0.
            if step > best[1] and in_history(starts, attempt, step - 1):
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
                if _is_sound(state, tags.get("crc32c")):
                    best = state, step
    return best


def read_tags(path: Path) -> dict[str, str] | None:
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return None


def _is_sound(state: dict[str, torch.Tensor], checksum: str | None) -> bool:
    finite = all(bool(tensor.isfinite().all()) for tensor in state.values())
    return finite and str(state_checksum(state)) == checksum


def state_checksum(state: dict[str, torch.Tensor]) -> int:
    checksum = 0
    for name in sorted(state):
        checksum = crc32c(memoryview(state[name].reshape(-1).view(torch.uint8).numpy()), checksum)  # type: ignore[arg-type]
    return checksum


def node_number(node: str) -> int:
    """Hash a node's name to a number that fits into int64."""
    return int.from_bytes(hashlib.sha256(node.encode()).digest()[:7], "little")


def is_first_on_its_node(rank: int, nodes: Sequence[int]) -> bool:
    """Return whether no worker of a lower rank is on the same node."""
    return nodes.index(nodes[rank]) == rank


def _folder(config: RunConfig, run: Run, worker: Worker) -> Path | None:
    """Return the folder of this node's snapshot; None if snapshots are off, or their folder is not writable."""
    base = config.checkpoint.snapshots
    if base is None or not os.access(base, os.W_OK):
        return None
    return Path(base, f"maestream-{run.run_id}", worker.node)


def _clear(base: Path, own: Path) -> None:
    """Remove abandoned snapshots of runs that were killed and did not resume."""
    for other in base.glob("maestream-*/"):
        with contextlib.suppress(OSError):
            times = [path.stat().st_mtime for path in (other, *other.glob("*/*"))]
            if other != own and time.time() - max(times) > ABANDONED_S:
                shutil.rmtree(other, ignore_errors=True)
