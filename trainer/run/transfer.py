"""Send the state of a run from one worker to the others."""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trainer.run.checkpoint import optimizer_state, set_optimizer_state
from trainer.run.worker import Worker

PIECE_BYTES = 64 << 20  # tensors are sent together up to this size, in one operation


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the tensors of a model and its optimizer, not copied: "model/<name>" and "optimizer/<parameter>/<state>"."""
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    return state | {f"optimizer/{name}": tensor for name, tensor in optimizer_state(model, optimizer).items()}


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """Copy a state that `state_of` returned into a model and its optimizer."""
    model.load_state_dict({n.removeprefix("model/"): t for n, t in state.items() if n.startswith("model/")})
    moments = {n.removeprefix("optimizer/"): t for n, t in state.items() if n.startswith("optimizer/")}
    set_optimizer_state(model, optimizer, moments)


def to_bytes(value: Any) -> torch.Tensor:
    """Encode a value as JSON: uint8[n]."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_bytes(data: torch.Tensor) -> Any:
    """Decode what `to_bytes` returned."""
    return json.loads(data.cpu().numpy().tobytes())


def send(state: dict[str, torch.Tensor], source: int, worker: Worker) -> dict[str, torch.Tensor]:
    """Send the tensors of rank `source` to all ranks, which get them on their device. Raises WorkerLost.

    Call it on every rank. The state of other ranks is ignored.
    """
    if worker.world_size == 1:
        return state
    own = to_bytes([(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in state.items()])
    length = torch.tensor([len(own)])
    worker.group.broadcast(length, source)
    outline = own if worker.rank == source else torch.empty(int(length), dtype=torch.uint8)
    worker.group.broadcast(outline, source)
    sent: dict[str, torch.Tensor] = {}
    for names, shapes, dtype in _pieces(from_bytes(outline)):
        sizes = [shape.numel() for shape in shapes]
        if worker.rank == source:
            piece = torch.cat([state[name].detach().reshape(-1).to(worker.device) for name in names])
        else:
            piece = torch.empty(sum(sizes), dtype=dtype, device=worker.device)
        worker.group.broadcast(piece.view(torch.uint8), source)  # gloo does not know all dtypes
        parts = zip(names, piece.split(sizes), shapes, strict=True)
        sent |= {name: part.view(shape) for name, part, shape in parts}
    return sent


def _pieces(outline: list[Any]) -> Iterator[tuple[list[str], list[torch.Size], torch.dtype]]:
    """Group tensors, each a name, a dtype's name and a shape, into pieces of one dtype and up to PIECE_BYTES."""
    names: list[str] = []
    shapes: list[torch.Size] = []
    dtype, size = torch.uint8, 0
    for name, dtype_name, sizes in outline:
        of_this, shape = getattr(torch, dtype_name), torch.Size(sizes)
        nbytes = shape.numel() * of_this.itemsize
        if names and (of_this != dtype or size + nbytes > PIECE_BYTES):
            yield names, shapes, dtype
            names, shapes, size = [], [], 0
        names.append(name)
        shapes.append(shape)
        dtype, size = of_this, size + nbytes
    if names:
        yield names, shapes, dtype
