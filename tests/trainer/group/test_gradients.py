"""Gradients that are summed during the backward pass are those of a plain all_reduce of each, also in the step after a loss."""

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from tests.support.training.elastic import LOST, Workers
from trainer.group import gradients as module
from trainer.group.gradients import BUCKET_BYTES, GradientSum
from trainer.group.group import Group

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# Parameters of a model: shape, which of DTYPES, and whether it is trained.
shapes = st.lists(st.integers(1, 6), max_size=3)
models = st.lists(st.tuples(shapes, st.integers(0, 2), st.booleans()), min_size=1, max_size=8)


class Model(nn.Module):
    """Its gradients are small integers, so that their sums are exact in any order."""

    def __init__(self, parameters: list[tuple[list[int], int, bool]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.ones(shape, dtype=DTYPES[dtype]), requires_grad=trained)
            for shape, dtype, trained in parameters
        )

    def loss(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        loss = torch.zeros((), dtype=torch.float64)
        for weight in self.weights:
            factors = torch.randint(-8, 9, weight.shape, generator=generator)
            loss = loss + (weight * factors.to(weight.dtype)).double().sum()
        return loss

    def gradients(self) -> list[torch.Tensor]:
        return [weight.grad for weight in self.weights if weight.grad is not None]


def backward(model: Model, sums: GradientSum, seed: int, micro_batches: int) -> None:
    """Do the backward passes of a step of this worker, as `trainer.step.step` does."""
    for i in range(micro_batches):
        loss = model.loss(seed + 1000 * i)
        if i == micro_batches - 1:
            sums.begin()
        loss.backward()
    sums.finish()


def plain(
    parameters: list[tuple[list[int], int, bool]], group: Group, seed: int, micro_batches: int
) -> Model:
    """Return a model with the gradients of the same step, summed in the plain way."""
    model = Model(parameters)
    for i in range(micro_batches):
        model.loss(seed + 1000 * i).backward()
    for gradient in model.gradients():
        group.all_reduce(gradient)
    return model


# ---- what workers do


def steps_are_right(
    group: Group, parameters: list[tuple[list[int], int, bool]], micro_batches: int, bucket_bytes: int
) -> bool:
    """Do three steps, and return whether the gradients were right, and sent in the buckets that were meant."""
    module.BUCKET_BYTES = bucket_bytes
    started: list[int] = []
    model = Model(parameters)
    sums = GradientSum(model, group, lambda: started.append(1))
    right = []
    for step in range(3):
        backward(model, sums, 10 * step + group.rank, micro_batches)
        expected = plain(parameters, group, 10 * step + group.rank, micro_batches)
        right += [torch.equal(*pair) for pair in zip(model.gradients(), expected.gradients(), strict=True)]
        model.zero_grad(set_to_none=step != 1)
    return all(right) and len(started) == 3 * len(sums.buckets) * (group.size > 1)


_in_training: list[tuple[Model, GradientSum]] = []
PARAMETERS = [
    ([5], 0, True),
    ([3, 2], 0, True),
    ([4], 0, False),
    ([7], 1, True),
    ([2], 0, True),
    ([], 0, True),
]


def lose_a_worker_in_a_backward_pass(group: Group, killed: bool, after: int) -> str:
    """Do a step in which one worker is killed before it sends its bucket number `after`, in the middle of the backward pass."""
    module.BUCKET_BYTES = 16
    sent = 0

    def before_a_bucket() -> None:
        nonlocal sent
        if sent == after and killed:
            os.kill(os.getpid(), signal.SIGKILL)
        while sent == after and not group.lost:
            time.sleep(0.005)
        sent += 1

    model = Model(PARAMETERS)
    sums = GradientSum(model, group, before_a_bucket)
    _in_training[:] = [(model, sums)]
    backward(model, sums, group.rank, micro_batches=2)
    return "no worker was lost"


def repeat_the_step(group: Group) -> bool:
    assert group.rebuild()
    [(model, sums)] = _in_training
    sums.on_start = lambda: None
    right = []
    for step in range(2):
        model.zero_grad(set_to_none=True)
        backward(model, sums, 10 * step + group.rank, micro_batches=2)
        expected = plain(PARAMETERS, group, 10 * step + group.rank, micro_batches=2)
        right += [torch.equal(*pair) for pair in zip(model.gradients(), expected.gradients(), strict=True)]
    return all(right)


# ---- tests


@pytest.fixture(scope="module", params=[2, 3])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    with Workers(request.param) as workers:
        workers.rebuild()
        yield workers


@pytest.mark.integration
@settings(max_examples=40)
@given(
    parameters=models,
    micro_batches=st.integers(1, 3),
    bucket_bytes=st.sampled_from([1, 40, 200, BUCKET_BYTES]),
)
def test_gradients_are_those_of_a_plain_all_reduce(
    workers: Workers, parameters: list, micro_batches: int, bucket_bytes: int
) -> None:
    parameters = [*parameters, ([2], 0, True)]  # something is trained
    assert workers.right(steps_are_right, parameters, micro_batches, bucket_bytes)


@pytest.mark.integration
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_step_is_right_after_a_worker_was_lost_in_its_backward_pass(after: int) -> None:
    with Workers(3) as workers:
        workers.rebuild()
        for name in workers.names:
            workers.ask(name, lose_a_worker_in_a_backward_pass, name == "w1", after)
        workers.processes["w1"].join()
        workers.lose("w1")
        assert set(workers.answers().values()) == {LOST}
        assert workers.right(repeat_the_step)


@given(parameters=models)
def test_a_single_worker_does_nothing(parameters: list) -> None:
    parameters = [*parameters, ([2], 0, True)]
    assert GradientSum(Model(parameters), Group()).buckets == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUCKET_BYTES", 1)  # restores what is set there
        assert steps_are_right(Group(), parameters, micro_batches=2, bucket_bytes=1)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.sampled_from(DTYPES)), max_size=30),
    most=st.integers(1, 400),
)
def test_buckets_hold_every_parameter_once_and_in_order(sizes: list, most: int) -> None:
    parameters = [nn.Parameter(torch.empty(size, dtype=dtype)) for size, dtype in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUCKET_BYTES", most)
        buckets = list(module._split(parameters))
    together = [parameter for bucket in buckets for parameter in bucket]
    assert [id(parameter) for parameter in together] == [id(parameter) for parameter in parameters]
    for bucket in buckets:
        assert len({parameter.dtype for parameter in bucket}) == 1
        assert len(bucket) == 1 or sum(parameter.nbytes for parameter in bucket) <= most
    for bucket, following in pairwise(buckets):  # none is smaller than it needs to be
        full = sum(parameter.nbytes for parameter in [*bucket, following[0]]) > most
        assert full or bucket[0].dtype != following[0].dtype


def test_the_last_layers_are_sent_first_and_frozen_ones_never() -> None:
    class Several(Group):
        several = True

    model = Model([([1], 0, True), ([2], 0, False), ([3], 0, True)])
    [bucket] = GradientSum(model, Several()).buckets
    assert [parameter.numel() for parameter in bucket.parameters] == [3, 1]
