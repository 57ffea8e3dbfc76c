"""The training step on a GPU computes the same as on a CPU, compiled or not; it never waits for the device, and its memory does
not grow.

pytest tests/gpu                        # builds a dataset of synthetic scenes
MAESTREAM_DATA=DATASET pytest tests/gpu # uses an existing dataset, so webdataset and Ray need not be installed
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.factory import make_decoder
from pipeline.loading.loader import Loader
from pipeline.loading.order import Order
from tests.support.datasets import build_dataset
from trainer.config.model_schema import ModelConfig
from trainer.config.recipe import parse_config
from trainer.config.schema import PretrainConfig
from trainer.models.masking import masking_noise
from trainer.train.benchmark import Bench, make_bench, resident_batch

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
    """Loss and gradients for fixed images, masks and weights."""
    torch.manual_seed(0)
    images = torch.randint(256, (32, 3, 96, 96), dtype=torch.uint8).to(bench.worker.device)
    noise = masking_noise(bench.config.model, 0, 0, torch.arange(32, device=bench.worker.device))
    loss = bench.trained(images, noise).mean()
    loss.backward()
    named = bench.model.named_parameters()
    return loss.detach().cpu(), {name: p.grad.cpu() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("compile_", ["always", "never"])
def test_gpu_gradients_match_the_cpus(compile_: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    loss, expected = gradients(bench_of(CPU, precision="float32", compile="never"))
    ours, found = gradients(bench_of(precision="float32", compile=compile_))
    assert ours == pytest.approx(float(loss), rel=1e-5)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-7, name


def test_losses_in_bf16_match_those_in_float32() -> None:
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
def test_masks_match_the_cpus(sampling: Any) -> None:
    model = ModelConfig(sampling=sampling)
    ids = torch.tensor([0, 5, 2**40, 1281166])
    for seed, epoch in ((0, 0), (3, 799), (2**31 - 1, 2**31)):
        noise = [masking_noise(model, seed, epoch, ids.to(device)).cpu() for device in (CPU, GPU)]
        assert torch.equal(*noise)


def test_a_step_never_waits_for_the_device() -> None:
    bench = bench_of(micro_batch=16)
    batch = resident_batch(bench.config, GPU)
    for _ in range(3):
        bench.step(batch)
    bench.worker.timer.start(GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            bench.step(batch)
            bench.worker.timer.mark("other")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_step_timer_measures_gpu_time() -> None:
    bench = bench_of()
    batch = resident_batch(bench.config, GPU)
    for _ in range(3):
        bench.step(batch)
    torch.cuda.synchronize()
    bench.worker.timer.start(GPU)
    begin = time.perf_counter()
    for _ in range(20):
        bench.step(batch)
    seconds = bench.worker.timer.take()
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
def test_memory_of_loader_and_step_does_not_grow(dataset: Dataset, decoder: Any) -> None:
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
