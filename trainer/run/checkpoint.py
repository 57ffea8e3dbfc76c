"""Checkpoints: RUN/checkpoints/step-00001234/, written by rank 0 on a background thread.

model.safetensors      the model's state dict, with the parameter names of the authors' code
optimizer.safetensors  "<parameter>/<state>" for every trained parameter
state.json             step, run id, dataset fingerprint, attempt, config
COMMITTED              an empty file, written last: a checkpoint without it is incomplete and ignored
"""

import json
import re
import threading
import time
from collections.abc import Collection, Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.storage.store import Store
from trainer.config.recipe import differences, parse_config
from trainer.config.schema import RunConfig
from trainer.run.run import Run, check_newest, in_history, read_starts

FOLDER = "checkpoints"
MARKER = "COMMITTED"
EMA = "ema"  # key of the averaged weights in the optimizer's state, see trainer.train.finetune
REMEDY = "remove its folder to resume from the checkpoint before"


def _folder(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"


def committed_steps(store: Store) -> list[int]:
    """Return the steps of the committed checkpoints, oldest first."""
    found = (re.fullmatch(rf"{FOLDER}/step-(\d+)/{MARKER}", name) for name in store.names(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def find_checkpoint(store: Store, step: int | None) -> int:
    """Return the step of a committed checkpoint: `step`, or the newest if it is None. UserError if there is none."""
    steps = committed_steps(store)
    if not steps:
        raise UserError(
            f"{store.url} has no committed checkpoint yet: wait for the first one, or resume its training"
        )
    if step is not None and step not in steps:
        committed = ", ".join(map(str, steps))
        raise UserError(f"{store.url} has no checkpoint of step {step}; committed steps: {committed}")
    return step or steps[-1]


def newest_checkpoint(store: Store) -> int:
    """Return the step of the newest committed checkpoint of the run's history, 0 if there is none.

    Newer checkpoints outside the history are removed: a later attempt started from an earlier step.
    """
    starts = read_starts(store)
    for step in reversed(committed_steps(store)):
        if is_in_history(store, step, starts) is not False:  # a damaged one is reported when it is loaded
            return step
        remove_checkpoints(store, [step])
    return 0


def is_in_history(store: Store, step: int, starts: list[int]) -> bool | None:
    """Whether a committed checkpoint belongs to the run's history. None if it is damaged.

    Args:
        starts: the step at which each attempt began, oldest attempt first.
    """
    try:
        attempt = int(json.loads(store.read(f"{_folder(step)}/state.json"))["attempt"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    # The state after `step` steps includes the update of step - 1, counted from 0.
    return in_history(starts, attempt, step - 1)


def step_of(name: str) -> int | None:
    """Return the step of the checkpoint that a file of the run belongs to, None for other files."""
    match = re.match(rf"{FOLDER}/step-(\d+)/", name)
    return int(match[1]) if match else None


def remove_checkpoints(store: Store, steps: Iterable[int]) -> None:
    """Remove checkpoints. If it is interrupted, no incomplete checkpoint is left that looks committed."""
    files = [name for step in steps for name in store.names(_folder(step))]
    # Files of one call are removed in any order, so the markers go first, in a call of their own.
    store.remove([name for name in files if name.endswith(MARKER)])
    store.remove([name for name in files if not name.endswith(MARKER)])


def steps_to_keep(steps: list[int], newest: int, every: int | None) -> set[int]:
    """Return which of the checkpoints at `steps` to keep: the `newest` newest, and the first in each interval of `every` steps.

    Removing the others does not change the result for those that are left, now or later.
    """
    kept = set(steps[-newest:])
    before = 0
    for step in steps:
        if every and step // every > before:
            kept.add(step)
            before = step // every
    return kept


def check_finite(step: int, model: nn.Module) -> None:
    """Raise UserError if a weight is not finite, so that it is not committed."""
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise UserError(
            f"after step {step} the weights are not finite ({broken[0]}, …); the newest checkpoint is from before that step. "
            "Start a new run with a lower optim.blr or a longer warm-up"
        )


class Checkpointer:
    """Writes the checkpoints of one attempt, one at a time, and removes those that the config does not keep. Rank 0 only."""

    def __init__(self, run: Run, config: RunConfig, fingerprint: str) -> None:
        self.run = run
        self.config = config
        self.fingerprint = fingerprint
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.committed: tuple[int, float] | None = None  # newest: step, and time in seconds since 1970

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Commit the state after `step` steps.

        Waits for the previous checkpoint and for the copy from the device; the files are written in the background.
        """
        self.wait()
        weights = {name: _copy(tensor) for name, tensor in model.state_dict().items()}
        moments = {name: _copy(tensor) for name, tensor in optimizer_state(model, optimizer).items()}
        self.thread = threading.Thread(target=self._write, args=(step, weights, moments), name="commit")
        self.thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint in progress is committed. Raises its error, if it failed."""
        if self.thread is not None:
            self.thread.join()
        if self.failure is not None:
            raise self.failure

    def _write(self, step: int, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        try:
            store, folder = self.run.store, _folder(step)
            check_newest(self.run)
            remove_checkpoints(store, [step])  # left by an attempt that was killed while writing it
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
        except BaseException as error:  # `wait` raises it in the training thread
            self.failure = error

    def _prune(self) -> None:
        """Remove checkpoints that are not kept, and files of incomplete ones."""
        store, rule = self.run.store, self.config.checkpoint
        kept = steps_to_keep(committed_steps(store), rule.keep, rule.keep_every)
        existing = {step for name in store.names(FOLDER) if (step := step_of(name)) is not None}
        remove_checkpoints(store, existing - kept)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors, by "<parameter>/<state>"."""
    return {
        f"{name}/{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def set_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]
) -> None:
    """Copy a state that `optimizer_state` returned into the optimizer of the same model."""
    parameters = dict(model.named_parameters())
    for name, tensor in state.items():
        parameter, _, key = name.rpartition("/")
        optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device, copy=True)


def load_weights(store: Store, step: int, model: nn.Module) -> None:
    """Load the weights of a committed checkpoint into a model. UserError if they are damaged or do not fit the model."""
    try:
        model.load_state_dict(read_weights(store, step))
    except RuntimeError as error:
        what = " ".join(str(error).split())  # PyTorch's message has several lines
        raise UserError(f"{store.describe(_folder(step))} does not fit the model: {what}") from None


def read_weights(store: Store, step: int) -> dict[str, torch.Tensor]:
    """Read the weights of a committed checkpoint, by name. UserError if they are damaged."""
    return _load(store, f"{_folder(step)}/model.safetensors")


def read_optimizer_state(store: Store, step: int, key: str) -> dict[str, torch.Tensor]:
    """Read one kind of optimizer state of a committed checkpoint, such as EMA, by parameter name."""
    state = _load(store, f"{_folder(step)}/optimizer.safetensors")
    return {
        name.removesuffix(f"/{key}"): tensor for name, tensor in state.items() if name.endswith(f"/{key}")
    }


def load_optimizer(store: Store, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state of a committed checkpoint. UserError if it is damaged."""
    set_optimizer_state(model, optimizer, _load(store, f"{_folder(step)}/optimizer.safetensors"))


def _load(store: Store, name: str) -> dict[str, torch.Tensor]:
    try:
        return load(store.read(name))
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{store.describe(name)} is damaged or missing ({error}): {REMEDY}") from None


def check_state(
    store: Store, step: int, run: Run, fingerprint: str, config: RunConfig, earlier: Collection[str] = ()
) -> None:
    """Raise UserError if a checkpoint is from another run, dataset or config.

    Args:
        fingerprint, earlier: of the dataset, and of what it was before it grew.
    """
    where = store.describe(_folder(step))
    try:
        state: dict[str, Any] = json.loads(store.read(f"{_folder(step)}/state.json"))
        before = parse_config(type(config), state["config"], where)
        found = {"run_id": state["run_id"], "fingerprint": state["fingerprint"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}/state.json is damaged or missing ({error}): {REMEDY}") from None
    wanted = {"run_id": run.run_id, "fingerprint": fingerprint}
    if found["fingerprint"] in earlier:
        wanted["fingerprint"] = found["fingerprint"]
    changed = [f"{key}: {found[key]} → {wanted[key]}" for key in wanted if found[key] != wanted[key]]
    if changed := [*changed, *differences(before, config)]:
        raise UserError(
            f"{where} was not written by this run ({'; '.join(changed)}): remove it, or choose another --out"
        )
