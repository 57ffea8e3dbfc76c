"""Optimizers, parameter groups and learning rate, compared with independent formulas."""

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, SequentialLR

from trainer.config.model_schema import ClassifierConfig
from trainer.config.optim_schema import FinetuneOptimConfig, LarsConfig
from trainer.models.classifier import Classifier
from trainer.step.optim import LARS, layered_adamw, learning_rate
from trainer.train.finetune import average, averaged
from trainer.weights.init import freeze

SHAPE = ClassifierConfig(image_size=16, patch_size=8, width=16, depth=4, heads=2, pool="mean", drop_path=0.3)


def test_each_layer_learns_slower_than_the_one_above() -> None:
    """Bao et al. 2021 (BEiT), as the authors' FINETUNE.md uses it: decay^(layers above), tokens at the bottom."""
    model = Classifier(SHAPE, 5)
    optimizer = layered_adamw(model, 4, FinetuneOptimConfig(layer_decay=0.5), 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale[names[id(parameter)]] = group["scale"]
            decay[names[id(parameter)]] = group["weight_decay"]
    assert set(scale) == set(names.values())
    assert scale["head.weight"] == scale["fc_norm.bias"] == 1
    assert [scale[f"blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    assert scale["patch_embed.proj.weight"] == scale["pos_embed"] == scale["cls_token"] == 1 / 32
    undecayed = {name for name, value in decay.items() if value == 0}
    assert undecayed == {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 or name in ("pos_embed", "cls_token")
    }
    assert set(decay.values()) == {0.0, 0.05}


@pytest.mark.parametrize(
    ("blocks", "trained"), [(0, []), (0.5, ["mlp"]), (1, [3]), (2, [2, 3]), (4, [0, 1, 2, 3])]
)
def test_partial_fine_tuning_trains_the_last_blocks(blocks: float, trained: list) -> None:
    model = Classifier(SHAPE, 5)
    freeze(model, 4, blocks)
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"} <= free
    of_blocks = {name for name in free if name.startswith("blocks.")}
    if trained == ["mlp"]:
        assert of_blocks == {f"blocks.3.mlp.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    else:
        assert {int(name.split(".")[1]) for name in of_blocks} == set(trained)
        assert len(of_blocks) == 12 * len(trained)
    assert not free & {"cls_token", "pos_embed", "patch_embed.proj.weight"}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_by_numpy(decay: float) -> None:
    """You et al. 2017, algorithm 1, with momentum 0.9 and η 0.001; weight decay is added to the gradient before scaling, as in
    the authors' util/lars.py."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(3, 4)), rng.normal(size=3)
    parameters = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in (weight, bias)]
    optimizer = LARS(parameters, LarsConfig(weight_decay=decay))
    moments = [np.zeros_like(weight), np.zeros_like(bias)]
    for step in range(4):
        lr = 0.5 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        gradients = [rng.normal(size=x.shape) for x in (weight, bias)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        decayed = gradients[0] + decay * weight
        ratio = 0.001 * np.linalg.norm(weight) / np.linalg.norm(decayed)
        moments[0] = 0.9 * moments[0] + ratio * decayed
        moments[1] = 0.9 * moments[1] + gradients[1]
        weight, bias = weight - lr * moments[0], bias - lr * moments[1]
    torch.testing.assert_close(parameters[0].detach(), torch.from_numpy(weight))
    torch.testing.assert_close(parameters[1].detach(), torch.from_numpy(bias))


def test_the_schedule_is_torchs() -> None:
    """Linear warm-up from 0, then half a cosine to min_lr, at every step."""
    config = FinetuneOptimConfig(blr=1e-3, warmup_epochs=5, min_lr=1e-4)
    steps_per_epoch, epochs, peak = 7, 20, 1e-3 * 1024 / 256
    warmup, total = 5 * steps_per_epoch, epochs * steps_per_epoch
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = SequentialLR(
        sgd,
        [
            LambdaLR(sgd, lambda step: step / warmup),
            CosineAnnealingLR(sgd, total - warmup, eta_min=1e-4),
        ],
        [warmup],
    )
    for step in range(total):
        ours = learning_rate(step, total, steps_per_epoch, 1024, config)
        assert ours == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9), step
        sgd.step()
        schedule.step()


def test_averaged_weights_by_hand() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    model = torch.nn.ParameterList([weight])
    optimizer = torch.optim.AdamW([weight])
    for value, expected in ((1.0, 1.0), (3.0, 1.2), (2.0, 1.28)):  # 0.9 · before + 0.1 · value
        weight.data.fill_(value)
        average(model, optimizer, 0.9)
        with averaged(model, optimizer):
            torch.testing.assert_close(weight.data, torch.tensor([expected]))
        assert weight.item() == value


def test_drop_path_drops_its_share_and_keeps_the_mean() -> None:
    model = Classifier(SHAPE, 5)
    ids = torch.arange(20_000)
    kept = model.drop_path_scales(0, 3, ids)
    assert kept.shape == (20_000, 4, 2)
    rates = torch.tensor([0.0, 0.1, 0.2, 0.3])  # from 0 to drop_path
    torch.testing.assert_close((kept == 0).float().mean(dim=(0, 2)), rates, atol=0.01, rtol=0)
    torch.testing.assert_close(kept.mean(dim=0), torch.ones(4, 2), atol=0.02, rtol=0)
    assert (kept[100:200] == model.drop_path_scales(0, 3, ids[100:200])).all()  # whoever else is there
    assert (kept != model.drop_path_scales(0, 4, ids)).any()


def test_a_dropped_branch_is_none() -> None:
    model = Classifier(SHAPE, 5).double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    kept = torch.ones(2, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(model(images, kept), model(images))
    kept[0, 2] = 0
    alone = Classifier(SHAPE.model_copy(update={"depth": 3}), 5).double()
    state = {
        name.replace("blocks.3", "blocks.2"): t
        for name, t in model.state_dict().items()
        if "blocks.2" not in name
    }
    alone.load_state_dict(state)
    torch.testing.assert_close(model(images, kept)[:1], alone(images[:1]))
    torch.testing.assert_close(model(images, kept)[1:], model(images[1:]))
