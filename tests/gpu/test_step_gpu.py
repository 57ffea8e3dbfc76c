"""The step on a GPU computes what the CPU does, compiled or not; it waits for nothing, and takes no more memory with time.

pytest tests/gpu                        # builds a dataset of scenes
MAESTREAM_DATA=DATASET pytest tests/gpu # takes that one, so that neither webdataset nor Ray need be installed
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_dataset

from pipeline.decode import make_decoder
from pipeline.loader import Loader
from pipeline.manifest import Dataset, open_dataset
from pipeline.order import Order
from trainer.bench import Bench, make_bench, resident_batch
from trainer.config import ModelConfig, PretrainConfig
from trainer.masks import noise_of
from trainer.recipe import parse_config

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MODEL = {
    "image_size": 96, "patch_size": 16, "width": 192, "depth": 4, "heads": 3,
    "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4,
}  # fmt: skip


def bench_of(device: torch.device = GPU, **changes: Any) -> Bench:
    tree = {"global_batch": 32, "model": MODEL, "optim": {"blr": 1e-3, "warmup_epochs": 0}}
    return make_bench(parse_config(PretrainConfig, {**tree, **changes}, "test"), device)


def gradients(bench: Bench) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of the same images, masks and weights."""
    torch.manual_seed(0)
    images = torch.randint(256, (32, 3, 96, 96), dtype=torch.uint8).to(bench.run.device)
    noise = noise_of(bench.config.model, 0, 0, torch.arange(32, device=bench.run.device))
    loss = bench.trained(images, noise).mean()
    loss.backward()
    named = bench.model.named_parameters()
    return loss.detach().cpu(), {name: p.grad.cpu() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("compile_", ["always", "never"])
def test_the_gpus_gradients_are_the_cpus(compile_: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    loss, expected = gradients(bench_of(CPU, precision="float32", compile="never"))
    ours, found = gradients(bench_of(precision="float32", compile=compile_))
    assert ours == pytest.approx(float(loss), rel=1e-5)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-7, name


def test_losses_in_bf16_are_those_in_float32() -> None:
    found = {}
    for precision in ("float32", "bf16"):
        bench = bench_of(precision=precision)
        for group in bench.optimizer.param_groups:
            group["lr"] = 1e-3
        torch.manual_seed(0)
        batch = resident_batch(bench.config, GPU)
        found[precision] = [float(bench.step(batch)[0]) for _ in range(30)]
    assert found["bf16"][-1] < 0.98 * found["bf16"][0]
    assert found["bf16"] == pytest.approx(found["float32"], rel=0.01)


@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
def test_masks_are_the_cpus(sampling: Any) -> None:
    model = ModelConfig(sampling=sampling)
    ids = torch.tensor([0, 5, 2**40, 1281166])
    for seed, epoch in ((0, 0), (3, 799), (2**31 - 1, 2**31)):
        noise = [noise_of(model, seed, epoch, ids.to(device)).cpu() for device in (CPU, GPU)]
        assert torch.equal(*noise)


def test_a_step_waits_for_nothing() -> None:
    bench = bench_of(micro_batch=16)
    batch = resident_batch(bench.config, GPU)
    for _ in range(3):
        bench.step(batch)
    bench.run.laps.start(GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            bench.step(batch)
            bench.run.laps.lap("other")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_laps_are_the_gpus_time() -> None:
    bench = bench_of()
    batch = resident_batch(bench.config, GPU)
    for _ in range(3):
        bench.step(batch)
    torch.cuda.synchronize()
    bench.run.laps.start(GPU)
    begin = time.perf_counter()
    for _ in range(20):
        bench.step(batch)
    seconds = bench.run.laps.take()
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - begin, rel=0.2, abs=0.01)
    assert seconds["step"] > 0.5 * sum(seconds.values())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    if url := os.environ.get("MAESTREAM_DATA"):
        yield open_dataset(url)
        return
    folder: Path = tmp_path_factory.mktemp("data")
    yield build_dataset("synthetic:?count=256&classes=4", str(folder / "scenes"))


@pytest.mark.parametrize("decoder", ["auto", "cpu"])
def test_loader_and_step_take_no_more_memory_with_time(dataset: Dataset, decoder: Any) -> None:
    bench = bench_of()
    order = Order(dataset.shard_samples, 0, 32, 8, 8)
    loader = Loader(dataset, order, make_decoder(decoder, 96, 8, GPU), 0, 1)
    taken = []
    for batch in loader.steps(0, 300):
        bench.step(batch)
        if batch.step % 50 == 49:
            torch.cuda.synchronize()
            taken.append(torch.cuda.memory_reserved())
    loader.close()
    assert taken[-1] == taken[1], taken
