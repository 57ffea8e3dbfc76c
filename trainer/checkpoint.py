"""Checkpoints: RUN/checkpoints/step-00001234/, written by rank 0 on a background thread.

model.safetensors      the state dict, under the authors' names
optimizer.safetensors  "<parameter>/<state>", for every parameter that is trained
state.json             step, run id, dataset fingerprint, attempt, config
COMMITTED              written last: a checkpoint is committed when it is there
"""

import json
import re
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.storage import Store
from trainer.config import RunConfig
from trainer.recipe import differences, parse_config
from trainer.run import Run, check_newest, in_history, read_starts

FOLDER = "checkpoints"
MARKER = "COMMITTED"
EMA = "ema"  # the name of averaged weights among the optimizer's state, see trainer.finetune
BACK = "remove its folder to go on from the checkpoint before"


def _folder(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"


def committed_steps(store: Store) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    found = (re.fullmatch(rf"{FOLDER}/step-(\d+)/{MARKER}", name) for name in store.names(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def chosen_step(store: Store, step: int | None) -> int:
    """The step of a commit: the newest, without `step`. UserError where there is none."""
    steps = committed_steps(store)
    if not steps:
        raise UserError(f"{store.url} has no committed checkpoint yet: let it train on")
    if step is not None and step not in steps:
        raise UserError(f"{store.url} has no commit of step {step}: it has {', '.join(map(str, steps))}")
    return step or steps[-1]


def newest_commit(store: Store) -> int:
    """The newest step that the run goes on from, 0 if there is none. Commits of attempts that others took over from
    before they ended are no part of the history, and removed."""
    starts = read_starts(store)
    for step in reversed(committed_steps(store)):
        if descends(store, step, starts) is not False:  # damaged: it is said when it is loaded
            return step
        remove_checkpoints(store, [step])
    return 0


def descends(store: Store, step: int, starts: list[int]) -> bool | None:
    """Whether a committed checkpoint is of the run's history, to which the attempts began at `starts`. None: damaged."""
    try:
        attempt = int(json.loads(store.read(f"{_folder(step)}/state.json"))["attempt"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    # The state after `step` steps has the last of them, step - 1, in it.
    return in_history(starts, attempt, step - 1)


def step_of(name: str) -> int | None:
    """Of which checkpoint a file of a run is."""
    match = re.match(rf"{FOLDER}/step-(\d+)/", name)
    return int(match[1]) if match else None


def remove_checkpoints(store: Store, steps: Iterable[int]) -> None:
    """Remove checkpoints. Whenever that is interrupted, none is left that looks committed and is not whole."""
    gone = [name for step in steps for name in store.names(_folder(step))]
    store.remove(
        [name for name in gone if name.endswith(MARKER)]
    )  # many at once, in no order: so these alone, first
    store.remove([name for name in gone if not name.endswith(MARKER)])


def kept_steps(steps: list[int], newest: int, every: int | None) -> set[int]:
    """Of commits at these steps the newest, and the first in each `every` steps, counted from the run's start.

    What this removes makes no difference to what it says of the others, now or later.
    """
    kept = set(steps[-newest:])
    before = 0
    for step in steps:
        if every and step // every > before:
            kept.add(step)
            before = step // every
    return kept


def check_finite(step: int, model: nn.Module) -> None:
    """UserError if a weight is not finite: nothing may be committed then."""
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise UserError(
            f"after step {step} the weights are not finite ({broken[0]}, …); the last commit is from before that. "
            "Start a new run with a lower optim.blr or a longer warm-up"
        )


class Checkpointer:
    """Writes checkpoints of one run, one at a time, and keeps those that the config says."""

    def __init__(self, run: Run, config: RunConfig, fingerprint: str) -> None:
        self.run = run
        self.config = config
        self.fingerprint = fingerprint
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.committed: tuple[int, float] | None = None  # its newest: step, and when (seconds since 1970)

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Commit the state after `step` steps. Waits for the copy off the device, not for the writing;
        waits for the commit before this one."""
        self.wait()
        weights = {name: _copy(tensor) for name, tensor in model.state_dict().items()}
        moments = {name: _copy(tensor) for name, tensor in optimizer_state(model, optimizer).items()}
        self.thread = threading.Thread(target=self._write, args=(step, weights, moments), name="commit")
        self.thread.start()

    def wait(self) -> None:
        """Wait for the commit under way. Raises what stopped it."""
        if self.thread is not None:
            self.thread.join()
        if self.failure is not None:
            raise self.failure

    def _write(self, step: int, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        try:
            store, folder = self.run.store, _folder(step)
            check_newest(self.run)
            remove_checkpoints(store, [step])  # of an attempt that died here
            for name, tensors in (("model", weights), ("optimizer", moments)):
                with store.staging(f"{folder}/{name}.safetensors") as path:
                    save_file(tensors, path)
            state = {
                "step": step,
                "run_id": self.run.run_id,
                "fingerprint": self.fingerprint,
                "attempt": self.run.attempt,
                "config": self.config.model_dump(),
            }
            store.write(f"{folder}/state.json", json.dumps(state, indent=2).encode())
            check_newest(self.run)
            store.write(f"{folder}/{MARKER}", b"")
            self.committed = step, time.time()
            self._prune()
        except BaseException as error:  # it belongs to the training thread
            self.failure = error

    def _prune(self) -> None:
        """Remove all steps but those to be kept: older ones, and what a kill left of unfinished ones."""
        store, rule = self.run.store, self.config.checkpoint
        kept = kept_steps(committed_steps(store), rule.keep, rule.keep_every)
        there = {step for name in store.names(FOLDER) if (step := step_of(name)) is not None}
        remove_checkpoints(store, there - kept)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as "<parameter>/<state>"."""
    return {
        f"{name}/{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def set_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]
) -> None:
    """What `optimizer_state` gave, into an optimizer of the same model."""
    parameters = dict(model.named_parameters())
    for name, tensor in state.items():
        parameter, _, key = name.rpartition("/")
        optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device, copy=True)


def load_weights(store: Store, step: int, model: nn.Module) -> None:
    """The weights of a committed checkpoint. UserError where they are damaged or of another model."""
    try:
        model.load_state_dict(read_weights(store, step))
    except RuntimeError as error:
        raise UserError(f"{store.describe(_folder(step))} is of another model: {error}") from None


def read_weights(store: Store, step: int) -> dict[str, torch.Tensor]:
    """The weights of a committed checkpoint, by name. UserError where they are damaged."""
    return _load(store, f"{_folder(step)}/model.safetensors")


def read_state(store: Store, step: int, key: str) -> dict[str, torch.Tensor]:
    """What the optimizer of a committed checkpoint has by the name of `key`, by parameter."""
    state = _load(store, f"{_folder(step)}/optimizer.safetensors")
    return {
        name.removesuffix(f"/{key}"): tensor for name, tensor in state.items() if name.endswith(f"/{key}")
    }


def load_optimizer(store: Store, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state of a committed checkpoint, for a model that has its weights."""
    set_optimizer_state(model, optimizer, _load(store, f"{_folder(step)}/optimizer.safetensors"))


def _load(store: Store, name: str) -> dict[str, torch.Tensor]:
    try:
        return load(store.read(name))
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{store.describe(name)} is damaged or gone ({error}): {BACK}") from None


def check_state(store: Store, step: int, run: Run, fingerprint: str, config: RunConfig) -> None:
    """UserError where a checkpoint is of another run, dataset or config than the one that wants it."""
    where = store.describe(_folder(step))
    try:
        state: dict[str, Any] = json.loads(store.read(f"{_folder(step)}/state.json"))
        before = parse_config(type(config), state["config"], where)
        found = {"run_id": state["run_id"], "fingerprint": state["fingerprint"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}/state.json is damaged or gone ({error}): {BACK}") from None
    wanted = {"run_id": run.run_id, "fingerprint": fingerprint}
    changed = [f"{key}: {found[key]} → {wanted[key]}" for key in wanted if found[key] != wanted[key]]
    if changed := [*changed, *differences(before, config)]:
        raise UserError(
            f"{where} was not written by this run ({'; '.join(changed)}): remove it, or choose another --out"
        )
