"""A state arrives at the other workers bit by bit, whatever its tensors are, in few pieces that are not too large."""

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from tests.support.training.elastic import Workers
from trainer.group.group import Group
from trainer.run import transfer
from trainer.run.transfer import PIECE_BYTES, from_bytes, load_state, send, state_of, to_bytes
from trainer.run.worker import Worker

DTYPES = [
    "float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "int16", "int8", "uint8", "uint16",
    "bool", "complex64",
]  # fmt: skip

# Tensors of a state: dtype and shape, which may be empty or 0-d.
outlines = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=12)


def make_state(outline: list[tuple[str, list[int]]], seed: int) -> dict[str, torch.Tensor]:
    """Return tensors of random bits, which are also those of NaNs."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for i, (dtype, sizes) in enumerate(outline):
        of_this, shape = getattr(torch, dtype), torch.Size(sizes)
        largest = 2 if dtype == "bool" else 256
        bits = torch.randint(
            largest, (shape.numel() * of_this.itemsize,), dtype=torch.uint8, generator=generator
        )
        tensor = bits.view(of_this).view(shape)
        state[f"tensor {i}"] = (
            tensor.transpose(0, -1).contiguous().transpose(0, -1) if len(sizes) > 1 else tensor
        )
    return state


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(state) == list(expected) and all(
        (state[name].dtype, state[name].shape, bits(state[name]))
        == (tensor.dtype, tensor.shape, bits(tensor))
        for name, tensor in expected.items()
    )


def arrives(group: Group, outline: list[tuple[str, list[int]]], source: int, piece_bytes: int) -> bool:
    transfer.PIECE_BYTES = piece_bytes
    state = make_state(outline, group.rank)  # that of other ranks is ignored
    return same(send(state, source, Worker(group)), make_state(outline, source))


@pytest.fixture(scope="module", params=[2, 3])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    with Workers(request.param) as workers:
        workers.rebuild()
        yield workers


@pytest.mark.integration
@settings(max_examples=60)
@given(outline=outlines, source=st.integers(0, 2), piece_bytes=st.sampled_from([1, 30, 100, PIECE_BYTES]))
def test_a_state_arrives_bit_by_bit(workers: Workers, outline: list, source: int, piece_bytes: int) -> None:
    source %= len(workers.names)
    assert workers.right(arrives, outline, source, piece_bytes)


def trains_the_same(group: Group) -> bool:
    """Give one worker's model and optimizer to the others, and train on with the same data."""
    torch.manual_seed(group.rank)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + group.rank)

    def step() -> None:
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    if group.rank == 1:
        step()
    state = state_of(model, optimizer) if group.rank == 1 else {}
    load_state(model, optimizer, send(state, 1, Worker(group)))
    for parameters in optimizer.param_groups:
        parameters["lr"] = 0.1
    torch.manual_seed(7)
    step()
    totals = torch.stack([tensor.double().sum() for tensor in state_of(model, optimizer).values()])
    return all(torch.equal(totals, others) for others in group.all_gather(totals))


@pytest.mark.integration
def test_workers_train_the_same_after_one_has_given_its_state(workers: Workers) -> None:
    assert workers.right(trains_the_same)


def test_a_single_worker_keeps_its_state() -> None:
    state = {"a": torch.ones(3)}
    assert send(state, 0, Worker()) is state


@given(outline=outlines, most=st.integers(1, 200))
def test_pieces_hold_every_tensor_once_and_are_not_too_large(outline: list, most: int) -> None:
    named = [(str(i), *entry) for i, entry in enumerate(outline)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "PIECE_BYTES", most)
        pieces = list(transfer._pieces(named))
    together = [
        (name, str(dtype).removeprefix("torch."), list(shape))
        for names, shapes, dtype in pieces
        for name, shape in zip(names, shapes, strict=True)
    ]
    assert together == named
    for names, shapes, dtype in pieces:
        assert len(names) == 1 or sum(shape.numel() for shape in shapes) * dtype.itemsize <= most


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=values)
def test_values_survive_as_bytes(value: Any) -> None:
    assert from_bytes(to_bytes(value)) == value
