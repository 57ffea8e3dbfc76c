"""Promises 3 and 4 for finetune and linprobe: the world size changes nothing, each sample is evaluated once, and a stopped
run resumes."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.storage.store import Store, open_store
from tests.support.datasets import build_dataset
from tests.support.runs import losses
from tests.support.training.gloo import gloo_group, run_workers
from tests.support.training.label_runs import COMMON, KINDS, SHAPE, config_of
from tests.support.training.small_runs import SMALL, request_after, train, weights
from trainer.config.recipe import parse_config
from trainer.config.schema import FinetuneConfig, LinprobeConfig, PretrainConfig
from trainer.evaluate.accuracy import evaluate, metrics_from_sums, sum_metrics
from trainer.evaluate.features import evaluate_shard
from trainer.evaluate.inference_shard import InferenceShard
from trainer.group.requests import Request
from trainer.models.classifier import Classifier
from trainer.models.vit import sincos_pos_embed
from trainer.run.checkpoint import load_weights
from trainer.run.metrics import read_metrics
from trainer.run.run import Run, create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.studies.study import prepare_study
from trainer.train.finetune import finetune
from trainer.weights.resize import interpolate_pos_embed

pytestmark = pytest.mark.integration


def _worker(rank: int, world_size: int, kind: str, data: str, out: str, init: Any) -> None:
    torch.set_num_threads(1)
    with gloo_group(f"{out}.rendezvous", rank, world_size) as group:
        dataset = open_dataset(data)
        config = config_of(kind, init, data)
        run = Run(open_store(out), Path(out).parent.name, 1)
        if rank == 0:
            create_run(config, run, dataset)
        assert KINDS[kind][1](config, dataset, run, Worker(group), Callbacks())


@pytest.fixture(scope="module")
def pretrained(scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    train(scenes, out, epochs=1.0)
    return {"run": str(out)}


@pytest.mark.parametrize("kind", KINDS)
def test_world_size_changes_nothing(
    kind: str, pretrained: dict[str, str], scenes: Dataset, tmp_path: Path
) -> None:
    """Drop path, RandAugment, erasing, mixing, batch statistics and evaluation are the same as with one worker."""
    for out, world_size in (("alone", 1), ("many", 3)):
        data = scenes.store.url
        run_workers(_worker, world_size, kind, data, str(tmp_path / out), pretrained)
    alone, many = losses(tmp_path / "alone"), losses(tmp_path / "many")
    assert len(alone) == 10
    assert many == pytest.approx(alone, rel=1e-9, abs=0)
    ours, theirs = weights(tmp_path / "alone"), weights(tmp_path / "many")
    for name, tensor in ours.items():
        assert torch.allclose(theirs[name], tensor, rtol=1e-7, atol=1e-9), name
    judged = [read_metrics(open_store(str(tmp_path / out)))[-1] for out in ("alone", "many")]
    assert judged[0]["val_loss"] == pytest.approx(judged[1]["val_loss"], rel=1e-9)
    assert judged[0]["val_top1"] == judged[1]["val_top1"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_resumes(
    kind: str, pretrained: dict[str, str], scenes: Dataset, tmp_path: Path
) -> None:
    loop = KINDS[kind][1]
    for out, stops in (("alone", []), ("often", [3, 4])):
        for stop in [*stops, None]:
            changes = {"checkpoint": {"snapshots": None}}
            config = config_of(kind, pretrained, scenes.store.url, **changes)
            config, run = open_run(str(tmp_path / out), config, scenes)
            create_run(config, run, scenes)
            if stop:
                callbacks = Callbacks(request_after(stop, Request.SAVE))
                assert not loop(config, scenes, run, Worker(), callbacks)
            else:
                assert loop(config, scenes, run, Worker(), Callbacks())
    assert losses(tmp_path / "often") == pytest.approx(losses(tmp_path / "alone"), rel=1e-9, abs=0)
    ours, theirs = weights(tmp_path / "alone"), weights(tmp_path / "often")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-9, atol=1e-12)


def _evaluate(rank: int, world_size: int, datasets: list[str], out: str) -> None:
    found = []
    with gloo_group(f"{out}/rendezvous-{world_size}", rank, world_size) as group:
        for data in datasets:
            seen: list[float] = []

            def logits(images: torch.Tensor, seen: list[float] = seen) -> torch.Tensor:
                marks = images.double().flatten(1).sum(dim=1)
                seen += marks.tolist()
                return torch.stack([marks * k % 7 for k in range(1, 8)], dim=1)

            measured = evaluate(
                logits, open_dataset(data), make_decoder("cpu", 32, 1), 0.875, 8, Worker(group)
            )
            parts: list[Any] = [None] * world_size
            dist.all_gather_object(parts, seen)
            found.append({"measured": measured, "seen": [mark for part in parts for mark in part]})
    if rank == 0:
        Path(f"{out}/{world_size}.json").write_text(json.dumps(found))


def test_each_sample_is_evaluated_once_at_any_world_size(scenes: Dataset, tmp_path: Path) -> None:
    """Counts that neither most world sizes nor batches of 8 divide (70 and 37), and one with which some ranks have no sample (3)."""
    datasets = [scenes, *(
        build_dataset(f"synthetic:?count={count}&classes=7", str(tmp_path / str(count))) for count in (37, 3)
    )]  # fmt: skip
    results = []
    for world_size in range(1, 6):
        run_workers(_evaluate, world_size, [dataset.store.url for dataset in datasets], str(tmp_path))
        results.append(json.loads((tmp_path / f"{world_size}.json").read_text()))
    for dataset, at_sizes in zip(datasets, zip(*results, strict=True), strict=True):
        assert len(set(at_sizes[0]["seen"])) == len(at_sizes[0]["seen"]) == dataset.samples
        for world_size, result in enumerate(at_sizes, 1):
            assert result["seen"] == at_sizes[0]["seen"], world_size
            for name, value in result["measured"].items():
                assert value == pytest.approx(at_sizes[0]["measured"][name], rel=1e-12), (world_size, name)


def test_a_bad_sample_counts_as_wrong(scenes: Dataset, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(scenes.store.root, tmp_path / "copy")
    dataset = open_dataset(str(tmp_path / "copy"))
    first = dataset.locate([0])
    path = tmp_path / "copy" / dataset.shard_name(0)
    harmed = bytearray(path.read_bytes())
    harmed[int(first.offset[0]) + 50 : int(first.offset[0]) + 60] = bytes(10)
    path.write_bytes(harmed)
    labels = iter(np.array_split(dataset.locate(np.arange(dataset.samples)).label, 7))

    def oracle(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.from_numpy(next(labels)), 7).double() * 100

    found = evaluate(oracle, dataset, make_decoder("cpu", 32, 1), 0.875, 10, Worker())
    assert found["val_bad"] == 1
    assert found["val_top1"] == pytest.approx(100 * 69 / 70)


def test_positions_are_interpolated() -> None:
    positions = sincos_pos_embed(32, (7, 6))
    larger = interpolate_pos_embed(positions, (7, 6), (14, 12))
    assert larger.shape == (1, 1 + 14 * 12, 32)
    assert (larger[:, 0] == positions[:, 0]).all()
    smaller = torch.nn.functional.avg_pool2d(larger[0, 1:].T.view(32, 14, 12), 2).flatten(1).T
    torch.testing.assert_close(smaller, positions[0, 1:], atol=0.1, rtol=0)
    assert interpolate_pos_embed(positions, (7, 6), (7, 6)) is positions


def test_an_encoder_takes_images_of_another_shape(
    pretrained: dict[str, str], scenes: Dataset, tmp_path: Path
) -> None:
    model = {**SHAPE, "image_size": [48, 24]}
    config = config_of("finetune", pretrained, scenes.store.url, model=model)
    config, run = open_run(str(tmp_path / "run"), config, scenes)
    create_run(config, run, scenes)
    assert finetune(config, scenes, run, Worker(), Callbacks())
    assert weights(tmp_path / "run")["pos_embed"].shape == (1, 1 + 6 * 3, 24)


def test_an_encoder_of_another_shape_is_refused(
    pretrained: dict[str, str], scenes: Dataset, tmp_path: Path
) -> None:
    model = {**SHAPE, "width": 48}
    config = config_of("finetune", pretrained, scenes.store.url, model=model)
    config, run = open_run(str(tmp_path / "run"), config, scenes)
    create_run(config, run, scenes)
    with pytest.raises(
        UserError, match=r"does not match this run's model: .* has shape \[.*24.*\], expected \[.*48.*\]"
    ):
        finetune(config, scenes, run, Worker(), Callbacks())
    with pytest.raises(UserError, match="has no checkpoint of step 7"):
        config_of("finetune", {**pretrained, "step": 7}, None)


def test_a_groups_scale_multiplies_its_learning_rate(scenes: Dataset, tmp_path: Path) -> None:
    optim = {"blr": 0.05, "warmup_epochs": 0.5, "layer_decay": 1e-3}
    config = config_of("finetune", "scratch", None, epochs=1.0, optim=optim)
    config, run = open_run(str(tmp_path / "run"), config, scenes)
    create_run(config, run, scenes)
    assert finetune(config, scenes, run, Worker(), Callbacks())
    torch.manual_seed(config.seed)
    before = Classifier(config.model, 7).double().state_dict()
    moved = {name: (tensor - before[name]).abs().max() for name, tensor in weights(tmp_path / "run").items()}
    assert moved["head.weight"] > 1e-3
    assert 0 < moved["patch_embed.proj.weight"] < 1e-8


def test_only_the_last_block_is_trained(pretrained: dict[str, str], scenes: Dataset, tmp_path: Path) -> None:
    config = config_of("finetune", pretrained, scenes.store.url, blocks=1, epochs=1.0)
    for stop in (2, None):
        fixed, run = open_run(str(tmp_path / "run"), config, scenes)
        create_run(fixed, run, scenes)
        callbacks = Callbacks(request_after(stop, Request.SAVE)) if stop else Callbacks()
        assert finetune(fixed, scenes, run, Worker(), callbacks) == (stop is None)
    before, after = weights(pretrained["run"]), weights(tmp_path / "run")
    same = {name for name in after if name in before and torch.equal(after[name], before[name])}
    frozen = {
        name for name in after if name.startswith(("patch_embed", "cls_token", "pos_embed", "blocks.0."))
    }
    assert same == frozen


def test_a_later_evaluation_has_the_same_result(
    pretrained: dict[str, str], scenes: Dataset, tmp_path: Path
) -> None:
    """It uses the averaged weights and the same crop."""
    optim = {"blr": 5.0, "warmup_epochs": 0.5, "ema": 0.9, "min_lr": 0.01}
    config = config_of("finetune", pretrained, scenes.store.url, optim=optim)
    config, run = open_run(str(tmp_path / "run"), config, scenes)
    create_run(config, run, scenes)
    assert finetune(config, scenes, run, Worker(), Callbacks())
    then = read_metrics(run.store)[-1]
    part = InferenceShard(run.store.url, then["step"] + 1, scenes.store.url, 0, scenes.samples, 1.0, batch=9)
    now = metrics_from_sums(evaluate_shard(part), scenes)
    assert now["val_loss"] == pytest.approx(then["val_loss"], rel=1e-4)  # during training it was float64
    assert now["val_top1"] == then["val_top1"]
    trained = loss_without_averaging(run.store, then["step"] + 1, config, scenes)
    assert (
        abs(trained - then["val_loss"]) > 0.01 * then["val_loss"]
    )  # the weights without averaging give another loss


def loss_without_averaging(store: Store, step: int, config: FinetuneConfig, dataset: Dataset) -> float:
    """Validation loss of the trained weights, not of their moving average."""
    model = Classifier(config.model, 7).double()
    load_weights(store, step, model)
    decoder = make_decoder("cpu", 32, 1)
    ids = np.arange(dataset.samples)
    sums = sum_metrics(model, dataset, decoder, 1.0, 9, ids, torch.device("cpu"))
    return metrics_from_sums(sums.tolist(), dataset)["val_loss"]


def test_relative_paths_are_resolved_once(
    pretrained: dict[str, str], scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers run in their own working directories, and a run may be resumed from another directory."""
    monkeypatch.chdir(Path(pretrained["run"]).parent)
    val = os.path.relpath(scenes.store.url)
    config = config_of("finetune", {"run": "run"}, val)
    config, run = open_run(str(tmp_path / "run"), config, scenes)
    create_run(config, run, scenes)
    monkeypatch.chdir(tmp_path)
    again = config_of("finetune", pretrained, scenes.store.url)
    assert open_run("run", again, scenes)[0] == config


def test_another_encoder_data_or_study_is_refused(scenes: Dataset, tmp_path: Path) -> None:
    base = {**COMMON, "model": SHAPE, "optim": {"blr": 1.0, "warmup_epochs": 0}}
    pretraining = parse_config(PretrainConfig, {**base, "data": SMALL["data"]}, "test")
    probing = parse_config(LinprobeConfig, {**base, "init": "scratch"}, "test")
    wider = parse_config(LinprobeConfig, {**base, "init": "scratch", "model": {**SHAPE, "width": 48}}, "test")
    store = open_store(str(tmp_path / "study"))
    recipes = {"pretrain": pretraining, "linprobe": probing}
    with pytest.raises(UserError, match="needs --linprobe or --finetune"):
        prepare_study("target", {"pretrain": pretraining}, scenes, scenes, store)
    with pytest.raises(UserError, match="different encoders"):
        prepare_study("target", {"pretrain": pretraining, "linprobe": wider}, scenes, scenes, store)
    prepare_study("target", recipes, scenes, scenes, store)
    prepare_study("target", recipes, scenes, scenes, store)
    with pytest.raises(UserError, match=r"another study .study target → schedule"):
        prepare_study("schedule", recipes, scenes, scenes, store)
    longer = pretraining.model_copy(update={"epochs": 5.0})
    with pytest.raises(UserError, match=r"pretrain.epochs 2.0 → 5.0"):
        prepare_study("target", {**recipes, "pretrain": longer}, scenes, scenes, store)
