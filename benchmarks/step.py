"""Compare our training step with others on the same device, in images per second.

    python -m benchmarks.step                                       # a ViT-B, on the GPU if there is one
    python -m benchmarks.step --recipe recipes/pretrain_vit_large.yaml --batch 256

- maestream: the step of `maestream pretrain`; on a GPU also without torch.compile, and with CUDA graphs
- transformers: ViTMAEForPreTraining in the same precision, with fused AdamW; on a GPU also with torch.compile
- plain: a loop in eager fp16 as the paper's authors describe theirs (`benchmarks.plain_mae`); float32 on a CPU

Images are on the device already. It also measures torch's attention kernels, forward and backward, for the shapes of the
model.
"""

import datetime
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from benchmarks.output import save_result
from benchmarks.plain_mae import PlainLoop
from pipeline.cpus import available_cores
from pipeline.loading.benchmark import cpu_model
from trainer.config.device import autocast, should_compile
from trainer.config.recipe import load_config
from trainer.config.schema import PretrainConfig
from trainer.train.benchmark import make_bench, resident_batch
from trainer.weights.state_dicts import transformers_config

ROUNDS = 3
Step = Callable[[], object]
console = Console(highlight=False, soft_wrap=True)


def ours(config: PretrainConfig, device: torch.device) -> Step:
    bench, batch = make_bench(config, device), resident_batch(config, device)
    return lambda: bench.step(batch)


def graphed(config: PretrainConfig, device: torch.device) -> Step:
    bench, batch = make_bench(config, device), resident_batch(config, device)
    forward = torch.compile(bench.model, dynamic=False, mode="reduce-overhead")
    graphed = replace(bench, trained=replace(bench.trained, forward=forward))
    return lambda: graphed.step(batch)


def theirs(config: PretrainConfig, device: torch.device, compiled: bool) -> Step:
    model = ViTMAEForPreTraining(ViTMAEConfig(**transformers_config(config.model))).to(device)
    called = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    images = torch.randn(config.global_batch, 3, *config.model.size, device=device)

    def step() -> None:
        with autocast(config, device):
            loss = called(pixel_values=images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(config: PretrainConfig, device: torch.device) -> Step:
    precision = torch.float16 if device.type == "cuda" else torch.float32
    loop = PlainLoop(config.model, precision, device)
    images = torch.randn(config.global_batch, 3, *config.model.size, device=device)
    return lambda: loop.step(images)


def contestants(config: PretrainConfig, device: torch.device) -> dict[str, Callable[[], Step]]:
    eager = config.model_copy(update={"compile": "never"})
    found = {"maestream": lambda: ours(config, device)}
    if should_compile(config, device):
        found["maestream, not compiled"] = lambda: ours(eager, device)
        found["maestream, CUDA graphs"] = lambda: graphed(config, device)
    found["transformers ViTMAE"] = lambda: theirs(config, device, False)
    if should_compile(config, device):
        found["transformers ViTMAE, compiled"] = lambda: theirs(config, device, True)
    found["plain loop"] = lambda: plain(config, device)
    return found


def rate(step: Step, batch: int, seconds: float, device: torch.device) -> float:
    """Images per second."""
    steps, begin = 0, time.perf_counter()
    while steps < 2 or time.perf_counter() - begin < seconds:
        step()
        steps += 1
        if device.type == "cuda" and steps % 4 == 0:
            torch.cuda.synchronize(device)  # otherwise the queue of steps would grow without limit
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return steps * batch / (time.perf_counter() - begin)


def attention(config: PretrainConfig, device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds of attention, forward and backward, with each kernel that supports these shapes."""
    model, n = config.model, config.global_batch
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = {
        "encoder": (n, model.heads, 1 + model.num_visible, model.width // model.heads),
        "decoder": (
            n,
            model.decoder_heads,
            1 + model.num_patches,
            model.decoder_width // model.decoder_heads,
        ),
    }
    rows = []
    for where, shape in shapes.items():
        row: dict[str, Any] = {"where": where, "shape": shape}
        for kernel in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
            None,
        ):
            q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

            def act(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
                F.scaled_dot_product_attention(q, k, v).sum().backward()

            try:
                if kernel is None:
                    act()
                    row["as chosen"] = 1000 / rate(act, 1, 0.2, device)
                else:
                    with sdpa_kernel(kernel):
                        act()
                        row[kernel.name.lower()] = 1000 / rate(act, 1, 0.2, device)
            except RuntimeError:  # does not support these shapes or this device
                continue
        rows.append(row)
    return rows


def measure(config: PretrainConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    steps = {name: make() for name, make in contestants(config, device).items()}
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in track(steps.values(), "warming up", console=console):
        for _ in range(3):
            step()
    for _ in track(range(ROUNDS), "rounds", console=console):
        for name, step in steps.items():
            rates[name].append(rate(step, config.global_batch, seconds, device))
    median = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "img_per_s": median,
        "rounds": rates,
        "maestream is faster by": {name: median["maestream"] / found for name, found in median.items()},
        "attention_ms": attention(config, device),
    }


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--recipe", default="recipes/pretrain_vit_base.yaml", show_default=True, help="Model to train.")
@click.option("--batch", type=int, help="Images in a batch.  [default: 256 on a GPU, 8 on a CPU]")
@click.option("--seconds", default=10.0, show_default=True, help="Duration of each measurement.")
def main(recipe: str, batch: int | None, seconds: float) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    n = batch or (256 if device.type == "cuda" else 8)
    config = load_config(PretrainConfig, recipe, (f"global_batch={n}", f"micro_batch={n}"))
    found = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.step", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "cores": available_cores(),
        "torch": torch.__version__,
        "recipe": recipe,
        "batch": n,
        **measure(config, device, seconds),
    }
    table = Table("", "img/s", "maestream's speed-up")
    for name, value in found["img_per_s"].items():
        table.add_row(name, f"{value:,.1f}", f"{found['maestream is faster by'][name]:.2f}")
    console.print(table)
    for row in found["attention_ms"]:
        kernels = ", ".join(
            f"{name} {ms:.2f} ms" for name, ms in row.items() if name not in ("where", "shape")
        )
        console.print(f"attention of the {row['where']}, {row['shape']}: {kernels}")
    name = Path(recipe).stem.removeprefix("pretrain_")
    console.print(save_result(f"{found['date']}-step-{device.type}-{name}", found))


if __name__ == "__main__":
    main()
