"""The training step: compilation and micro-batches do not change its result; its FLOPs and its time are accounted for."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from tests.support.runs import losses
from tests.support.training.small_runs import SMALL, config_of, spawn, train
from trainer.config.device import should_compile
from trainer.config.model_schema import ModelConfig
from trainer.run.step_timer import PARTS, StepTimer, shares
from trainer.step.micro_batch import fastest
from trainer.train.benchmark import BASELINE, count_flops, table_2

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")


needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU"
)


@pytest.mark.soak  # the compiler takes a minute or two
@needs_compiler
def test_compiling_changes_no_loss_and_is_cached(
    scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64. A second start of the run compiles nothing again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    changes: dict[str, Any] = {"epochs": 2.0, "model": SMALL["model"] | {"depth": 1}}
    train(scenes, tmp_path / "eager", **changes, compile="never")
    for out in ("compiled", "again"):
        torch._dynamo.reset()
        counters.clear()
        train(scenes, tmp_path / out, **changes, compile="always")
        compiled_anew = counters["aot_autograd"]["autograd_cache_miss"]
        assert (compiled_anew > 0) == (out == "compiled"), dict(counters["aot_autograd"])
        assert losses(tmp_path / out) == pytest.approx(losses(tmp_path / "eager"), rel=1e-9, abs=0)


@pytest.mark.soak
@needs_compiler
def test_compiling_changes_no_loss_of_two_workers(scenes: Dataset, tmp_path: Path) -> None:
    """In float64, with micro-batches; gradients are averaged over the workers only with the last."""
    changes: dict[str, Any] = {"epochs": 2.0, "model": SMALL["model"] | {"depth": 1}, "micro_batch": 3}
    train(scenes, tmp_path / "eager", **changes, compile="never")
    spawn(2, scenes.store.url, str(tmp_path / "compiled"), {**changes, "compile": "always"})
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-9, abs=0)


def test_when_a_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert should_compile(config_of(), gpu)
    assert not should_compile(config_of(), CPU)
    assert not should_compile(config_of(compile="never"), gpu)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UserError, match="compile=always needs a C\\+\\+ compiler"):
        should_compile(config_of(compile="always"), CPU)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_automatic_micro_batch_changes_no_loss(scenes: Dataset, tmp_path: Path, world_size: int) -> None:
    """Promise 4, in float64: the global batch is the same with any micro-batch."""
    train(scenes, tmp_path / "fixed", micro_batch=5)
    if world_size == 1:
        train(scenes, tmp_path / "auto", micro_batch="auto")
    else:
        spawn(world_size, scenes.store.url, str(tmp_path / "auto"), {"micro_batch": "auto"})
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "fixed"), rel=1e-9, abs=0)


def test_the_fastest_micro_batch_that_fits_is_taken() -> None:
    def found(fits: int, seconds: float, each: float) -> int:
        def trial(n: int) -> float:
            assert n <= 100
            if n > fits:
                raise torch.OutOfMemoryError
            return seconds + n * each

        return fastest(trial, first=8, most=100)

    assert found(fits=100, seconds=1, each=0) == 100  # twice as many take no longer: all of them
    assert found(fits=40, seconds=1, each=0) == 32
    assert found(fits=100, seconds=0, each=1) == 8  # twice as many take twice as long
    assert found(fits=100, seconds=1, each=0.5) == 64  # the others bring a hundredth more
    with pytest.raises(torch.OutOfMemoryError):
        found(fits=7, seconds=1, each=1)


def test_flops_are_those_of_the_matrix_products() -> None:
    """2 operations per multiply-add in the forward pass, twice as many in the backward pass; pixels need no gradient."""
    model = ModelConfig(
        image_size=(48, 32), patch_size=8, width=36, depth=3, heads=3,
        decoder_width=24, decoder_depth=2, decoder_heads=2,
    )  # fmt: skip
    patches, kept, pixels = 24, 6, 8 * 8 * 3

    def flops_of(visible: int, predicted: int, decoder_depth: int) -> int:
        def blocks(tokens: int, width: int, depth: int) -> int:
            return 3 * depth * (24 * tokens * width**2 + 4 * tokens**2 * width)

        return (
            2 * 2 * visible * pixels * 36
            + blocks(1 + visible, 36, 3)
            + 3 * 2 * (1 + visible) * 36 * 24
            + blocks(1 + patches, 24, decoder_depth)
            + 3 * 2 * predicted * 24 * pixels
        )

    assert count_flops(model) == flops_of(kept, patches - kept, 2)
    rows = table_2(model)
    assert count_flops(rows[BASELINE]) == flops_of(patches, patches - kept, 8)
    assert count_flops(rows["8 blocks"]) == flops_of(kept, patches - kept, 8)
    assert count_flops(rows["1 block"]) == flops_of(kept, patches - kept, 1)


def test_the_parts_of_a_step_add_up_to_its_time() -> None:
    timer = StepTimer()
    timer.mark("step")  # nothing is kept before it starts
    timer.start(CPU)
    begin = time.perf_counter()
    for _ in range(3):
        time.sleep(0.01)
        timer.mark("data_wait")
        time.sleep(0.02)
        timer.mark("step")
    took = time.perf_counter() - begin
    seconds = timer.take()
    assert list(seconds) == list(PARTS)
    assert sum(seconds.values()) == pytest.approx(took, abs=0.05)
    assert seconds["data_wait"] >= 0.03
    assert seconds["step"] >= 0.06
    assert sum(shares(seconds).values()) == pytest.approx(1)
    assert sum(timer.take().values()) == 0
    assert set(shares(timer.take()).values()) == {0.0}


def test_every_row_has_the_time_of_the_parts(scenes: Dataset, tmp_path: Path) -> None:
    from pipeline.storage.store import open_store
    from trainer.run.metrics import read_metrics

    train(scenes, tmp_path / "alone", checkpoint={"every_steps": 4})
    spawn(2, scenes.store.url, str(tmp_path / "two"), {"data": SMALL["data"]})
    for out in ("alone", "two"):
        rows = read_metrics(open_store(str(tmp_path / out)))
        assert all(sum(row["time"].values()) == pytest.approx(1) for row in rows)
        last = rows[-1]["time"]
        assert list(last) == list(PARTS)
        assert (last["all_reduce"] > 0) == (out == "two")
        assert min(last[part] for part in PARTS if part != "all_reduce") > 0
