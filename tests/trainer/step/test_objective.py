"""Losses and targets of several classes and of numbers, against independent formulas."""

import numpy as np
import pytest
import torch
from torch import nn

from trainer.labels.labels import Labels
from trainer.step.objective import make_targets, sample_losses

NUMBERS = Labels(kind="numbers", outputs=2, mean=(2015.0, -3.5), deviation=(2.0, 1e-3))


def test_several_classes_have_timms_smoothing_and_the_mean_of_binary_cross_entropies() -> None:
    """timm: the target of a class that a sample has is 1 − smoothing + smoothing / classes, of another smoothing / classes."""
    labels = Labels(kind="classes", outputs=5)
    rng = torch.Generator().manual_seed(0)
    has = torch.randint(0, 2, (8, 5), generator=rng).float()
    targets = make_targets(has, labels, 0.1, torch.float32)
    torch.testing.assert_close(targets, torch.where(has > 0, 0.9 + 0.1 / 5, 0.1 / 5))
    logits = torch.randn(8, 5, generator=rng, dtype=torch.float64)
    p, y = torch.sigmoid(logits), targets.double()
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean(dim=1)
    torch.testing.assert_close(sample_losses(logits, targets, "classes"), expected)


def test_a_class_is_trained_as_before() -> None:
    labels = Labels(kind="class", outputs=5)
    targets = make_targets(torch.tensor([3, 0]), labels, 0.2, torch.float32)
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    expected = nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none")(logits, torch.tensor([3, 0]))
    torch.testing.assert_close(sample_losses(logits, targets, "class"), expected)


def test_numbers_are_standardised_for_the_loss_and_predicted_in_their_units() -> None:
    numbers = torch.tensor([[2013.0, -3.501], [2015.0, -3.5], [2019.0, -3.498]])
    targets = make_targets(numbers, NUMBERS, 0.1, torch.float64)
    torch.testing.assert_close(
        targets, torch.tensor([[-1.0, -1], [0, 0], [2, 2]]).double(), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(NUMBERS.in_units(targets), numbers.double())
    outputs = torch.tensor([[1.0, -1], [0, 3], [2, 2]], dtype=torch.float64)
    exact = torch.tensor([[-1.0, -1], [0, 0], [2, 2]], dtype=torch.float64)
    assert sample_losses(outputs, exact, "numbers").tolist() == [2.0, 4.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_in_units_predicts_what_the_trained_head_does(dtype: torch.dtype) -> None:
    head = nn.Linear(6, 2).to(dtype)
    other = nn.Linear(6, 2).to(dtype)
    weight, bias = NUMBERS.head_in_units(head.weight, head.bias)
    other.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    x = torch.randn(9, 6, dtype=dtype)
    torch.testing.assert_close(other(x), NUMBERS.in_units(head(x)))
    classes = Labels(kind="classes", outputs=2)
    assert classes.head_in_units(head.weight, head.bias) == (head.weight, head.bias)
    assert np.array_equal(classes.in_units(head(x)).detach(), head(x).detach())
