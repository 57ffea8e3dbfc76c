"""Hot snapshots: the newest state of a run in the memory of each of its nodes.

Every few steps one worker of each node leaves the state in a memory-backed folder of that node. When workers are
started again they agree on the newest state that any of their machines still has, and one sends it to the others:
losing one node of several costs a few steps, and not minutes.

    FOLDER/maestream-<run id>/<node>/state.safetensors     model/…, optimizer/…, as in a checkpoint, and rows of
                                                          metrics; attempt, step, config digest, checksum

A node has at most two of these files, one of them being written, and a copy of the state in its writer's memory: a
ViT-B's state (weights and AdamW's two moments, float32) is 1.3 GB.
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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from crc32c import crc32c
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from trainer.checkpoint import optimizer_state, set_optimizer_state
from trainer.config import RunConfig
from trainer.recipe import fixed_part
from trainer.run import Run, in_history, read_starts

STATE, WRITING = "state.safetensors", "writing"
COST = 0.025  # of a core's time, that snapshots may take: steps lose 1.05 times as much (benchmarks/snapshots.py)
FEWEST = 5  # steps between two
ROWS = "rows"  # the name of the rows of metrics among the tensors: JSON, uint8
FORGOTTEN_S = 3600  # what a killed run left here goes after that
Rows = list[dict[str, Any]]
log = logging.getLogger("maestream")


def config_digest(config: RunConfig) -> str:
    """Of all that may not differ when a run goes on."""
    return hashlib.sha256(json.dumps(fixed_part(config), sort_keys=True).encode()).hexdigest()


class Snapshots:
    """The snapshots of one attempt. The same calls on every rank, from step `start` on."""

    def __init__(self, run: Run, config: RunConfig, start: int) -> None:
        self.run, self.digest = run, config_digest(config)
        self.next = start + 1  # the first comes at once: until then a death costs all since the last commit
        self.last, self.last_at = start, time.perf_counter()
        self.committed = 0.0  # steps in rank 0's newest commit
        nodes = _nodes(run)
        self.nodes = set(nodes)  # of this attempt
        self.writes = _is_first_on_its_node(run, nodes)
        self.folder = _folder(config, run) if self.writes else None
        self.host: dict[str, torch.Tensor] = {}  # the copy that is being written
        self.copied: torch.cuda.Event | None = None
        self.cost_s = 0.0  # of one, of a core, to those who train
        self.thread: threading.Thread | None = None
        if self.folder:
            _clear(self.folder.parent.parent, self.folder.parent)

    def due(self, step: int) -> bool:
        """Whether one is to be taken after `step` steps: the same on every rank."""
        return step >= self.next

    def take(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, committed: int
    ) -> None:
        """Leave the state after `step` steps, with rows of metrics that no commit has yet. Waits for the copy where the
        CPU makes it, and for nothing else; does without where the last one is still being written.

        `committed`: rank 0's newest commit; afterwards every rank knows it.
        """
        now, begin = time.perf_counter(), time.thread_time()
        if self.folder and not (self.thread and self.thread.is_alive()):
            self._copy(model, optimizer, rows)
            copy_s = time.thread_time() - begin
            self.thread = threading.Thread(target=self._write, args=(step, copy_s), name="snapshot")
            self.thread.start()
        # Those that write know what it costs, and all have to take the next one after the same step.
        step_s = (now - self.last_at) / max(step - self.last, 1)
        shared = torch.tensor([self.cost_s, step_s, committed], dtype=torch.float64, device=self.run.device)
        if self.run.world_size > 1:
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        cost_s, step_s, self.committed = shared.tolist()
        self.next = step + max(FEWEST, math.ceil(cost_s / (COST * step_s)))
        self.last, self.last_at = step, now

    def keep(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows) -> bool:
        """Leave the state after `step` steps, and wait for it. Returns whether every node has it."""
        if self.thread is not None:
            self.thread.join()
        if self.folder:
            self._copy(model, optimizer, rows)
            self._write(step, 0.0)
        has = torch.tensor(int(self.folder is not None or not self.writes), device=self.run.device)
        if self.run.world_size > 1:
            dist.all_reduce(has, dist.ReduceOp.MIN)
        return bool(has)

    def _copy(self, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows) -> None:
        state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        state |= {f"optimizer/{name}": tensor for name, tensor in optimizer_state(model, optimizer).items()}
        on_gpu = self.run.device.type == "cuda"
        self.host[ROWS] = _to_bytes(rows)
        for name, tensor in state.items():
            if name not in self.host:
                self.host[name] = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
        if not on_gpu:
            for name, tensor in state.items():
                self.host[name].copy_(tensor)
            return
        stream = torch.cuda.Stream(self.run.device)
        stream.wait_stream(torch.cuda.current_stream(self.run.device))
        with torch.cuda.stream(stream):
            for name, tensor in state.items():
                self.host[name].copy_(tensor, non_blocking=True)
            self.copied = stream.record_event()

    def before_update(self) -> None:
        """To be called before the optimizer's step, which may not change what is still being copied."""
        if self.copied is not None:
            torch.cuda.current_stream(self.run.device).wait_event(self.copied)

    def _write(self, step: int, copy_s: float) -> None:
        assert self.folder is not None
        begin = time.thread_time()
        try:
            if self.copied is not None:
                self.copied.synchronize()
            tags = {
                "run_id": self.run.run_id,
                "attempt": str(self.run.attempt),
                "step": str(step),
                "config": self.digest,
                "crc32c": str(_checksum(self.host)),
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(self.host, self.folder / WRITING, tags)
            (self.folder / WRITING).replace(self.folder / STATE)
            self._clear_older()
        except (OSError, SafetensorError) as error:
            log.warning("no more snapshots in %s (%s): a death now costs the steps since the last commit",
                        self.folder, error)  # fmt: skip
            self._remove()
            self.folder = None
        # A GPU goes on meanwhile, a CPU shares its cores with the writing.
        self.cost_s = copy_s + (time.thread_time() - begin if self.copied is None else 0)

    def _clear_older(self) -> None:
        """Remove what older attempts left on this machine under the names of nodes that this one does without: Ray gives
        a machine a new name whenever it is started there."""
        assert self.folder is not None
        for other in self.folder.parent.glob(f"*/{STATE}"):
            tags = _tags(other)
            if (
                tags is not None
                and int(tags["attempt"]) < self.run.attempt
                and _number(other.parent.name) not in self.nodes
            ):
                shutil.rmtree(other.parent, ignore_errors=True)

    def close(self) -> None:
        """The run has ended, and needs them no more."""
        if self.thread is not None:
            self.thread.join()
        self._remove()

    def _remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # of other nodes on this machine
                self.folder.parent.rmdir()


def restore(
    run: Run, config: RunConfig, commit: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, Rows] | None:
    """The newest snapshot on any of the workers' machines, if it is newer than the commit after `commit` steps.

    Returns its step and its rows of metrics. Then model and optimizer have its state, on every rank.
    """
    state, step = _newest(run, config, commit)
    newest = torch.tensor([step], device=run.device)
    steps = [torch.empty_like(newest) for _ in range(run.world_size)]
    if run.world_size > 1:
        dist.all_gather(steps, newest)
    else:
        steps = [newest]
    best = max(int(s) for s in steps)
    if best <= commit:
        return None
    source = next(rank for rank, s in enumerate(steps) if int(s) == best)
    if run.world_size > 1:
        state = _send(state, source, run)
    rows = _from_bytes(state.pop(ROWS))
    model.load_state_dict({n.removeprefix("model/"): t for n, t in state.items() if n.startswith("model/")})
    moments = {n.removeprefix("optimizer/"): t for n, t in state.items() if n.startswith("optimizer/")}
    set_optimizer_state(model, optimizer, moments)
    return best, rows


def _newest(run: Run, config: RunConfig, commit: int) -> tuple[dict[str, torch.Tensor], int]:
    """The newest whole snapshot on this machine that belongs to the run's history and is newer than the commit, and its
    step; nothing, and the commit's, if there is none."""
    best: tuple[dict[str, torch.Tensor], int] = {}, commit
    if config.checkpoint.snapshots is None or not _is_first_on_its_node(run, _nodes(run)):
        return best
    starts, digest = read_starts(run.store), config_digest(config)
    for path in Path(config.checkpoint.snapshots, f"maestream-{run.run_id}").glob(f"*/{STATE}"):
        # One that is torn, or goes while it is read, is none. It is opened once: workers of the attempt before, who are
        # not all dead yet, may put another in its place.
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            tags = file.metadata() or {}
            if tags.get("run_id") != run.run_id or tags.get("config") != digest:
                continue
            step, attempt = int(tags["step"]), int(tags["attempt"])
            # The state after `step` steps has the last of them, step - 1, in it.
            if step > best[1] and in_history(starts, attempt, step - 1):
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
                if _is_sound(state, tags.get("crc32c")):
                    best = state, step
    return best


def _tags(path: Path) -> dict[str, str] | None:
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return None


def _is_sound(state: dict[str, torch.Tensor], checksum: str | None) -> bool:
    finite = all(bool(tensor.isfinite().all()) for tensor in state.values())
    return finite and str(_checksum(state)) == checksum


def _checksum(state: dict[str, torch.Tensor]) -> int:
    checksum = 0
    for name in sorted(state):
        checksum = crc32c(memoryview(state[name].reshape(-1).view(torch.uint8).numpy()), checksum)  # type: ignore[arg-type]
    return checksum


def _to_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(data: torch.Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())


def _send(state: dict[str, torch.Tensor], source: int, run: Run) -> dict[str, torch.Tensor]:
    """What `source` has, to all others."""
    own = _to_bytes([(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in state.items()])
    length = torch.tensor([len(own)], device=run.device)
    dist.broadcast(length, source)
    outline = torch.empty(int(length), dtype=torch.uint8, device=run.device)
    if run.rank == source:
        outline.copy_(own)
    dist.broadcast(outline, source)
    sent = {}
    for name, dtype, shape in _from_bytes(outline):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=run.device)
        if run.rank == source:
            tensor.copy_(state[name])
        dist.broadcast(tensor, source)
        sent[name] = tensor
    return sent


def _nodes(run: Run) -> list[int]:
    """The node of each worker."""
    own = torch.tensor([_number(run.node)], device=run.device)
    nodes = [torch.empty_like(own) for _ in range(run.world_size)]
    if run.world_size > 1:
        dist.all_gather(nodes, own)
    else:
        nodes = [own]
    return [int(node) for node in nodes]


def _number(node: str) -> int:
    """A node's name as a number that fits into int64."""
    return int.from_bytes(hashlib.sha256(node.encode()).digest()[:7], "little")


def _is_first_on_its_node(run: Run, nodes: list[int]) -> bool:
    return run.rank == nodes.index(nodes[run.rank])


def _folder(config: RunConfig, run: Run) -> Path | None:
    """Where this node's snapshots lie; None where they are not wanted, or there is no such folder."""
    base = config.checkpoint.snapshots
    if base is None or not os.access(base, os.W_OK):
        return None
    return Path(base, f"maestream-{run.run_id}", run.node)


def _clear(base: Path, own: Path) -> None:
    """Remove what runs left that were killed for good."""
    for other in base.glob("maestream-*/"):
        with contextlib.suppress(OSError):
            times = [path.stat().st_mtime for path in (other, *other.glob("*/*"))]
            if other != own and time.time() - max(times) > FORGOTTEN_S:
                shutil.rmtree(other, ignore_errors=True)
