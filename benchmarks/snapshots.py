"""What hot snapshots cost: steps of a recipe's model with them and without, in turn.

    python -m benchmarks.snapshots              # a ViT-B, on the GPU if there is one

Images are on the device already, so that nothing but steps and snapshots takes time. Reported are the time of a step
with snapshots over one without (the median over rounds), the steps between two snapshots, and the bytes they keep.
"""

import datetime
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.datasets import resident_batch
from benchmarks.report import RESULTS, cpu_model
from pipeline.decode import available_cores
from pipeline.storage import open_store
from trainer.config import PretrainConfig, load_config
from trainer.mae import MAE
from trainer.optim import adamw
from trainer.pretrain import train_step
from trainer.run import Run
from trainer.snapshot import STATE, Snapshots


def measure(config: PretrainConfig, run: Run, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds a step, with snapshots and without, of each round; how many were taken, and the bytes of the newest."""
    torch.manual_seed(0)
    model = MAE(config.model).to(run.device)
    optimizer = adamw(model, config.optim)
    batch = resident_batch(config, run.device)
    snapshots = Snapshots(run, config, 0)
    optimizer.register_step_pre_hook(lambda *_: snapshots.before_update())
    counted, taken = itertools.count(1), 0

    def seconds(hot: bool) -> float:
        nonlocal taken
        begin = time.perf_counter()
        for _ in range(steps):
            train_step(model, optimizer, batch, config, run)
            if hot and snapshots.due(done := next(counted)):
                snapshots.take(done, model, optimizer, [], 0)
                taken += 1
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return (time.perf_counter() - begin) / steps

    seconds(hot=False), seconds(hot=True)  # memory is had, and what one costs is known
    taken = 0
    found: dict[str, Any] = {"with": [], "without": []}
    for _ in track(range(rounds), "rounds"):
        found["without"].append(seconds(hot=False))
        found["with"].append(seconds(hot=True))
    assert snapshots.folder is not None
    found["bytes"] = (snapshots.folder / STATE).stat().st_size
    found["steps between two"] = rounds * steps / max(taken, 1)
    found["with ÷ without"] = statistics.median(
        a / b for a, b in zip(found["with"], found["without"], strict=True)
    )
    snapshots.close()
    return found


@click.command()
@click.option("--recipe", default="recipes/pretrain_vit_base.yaml", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--steps", default=30, show_default=True, help="Of each kind in a round.")
def main(recipe: str, batch: int, rounds: int, steps: int) -> None:
    console = Console(highlight=False)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    config = load_config(PretrainConfig, recipe, (f"global_batch={batch}", "data.lanes=1"))
    with tempfile.TemporaryDirectory(prefix="maestream-bench-") as folder:
        run = replace(Run(open_store(folder), "benchmark", 1), device=device)
        found = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python -m benchmarks.snapshots", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
            "cores": available_cores(),
            "recipe": recipe,
            "batch": batch,
            **measure(config, run, rounds, steps),
        }
    console.print(
        f"a step takes {statistics.median(found['without']):.2f} s, with snapshots {found['with ÷ without']:.3f} of "
        f"that; one each {found['steps between two']:.0f} steps, {found['bytes'] / 1e9:.2f} GB"
    )
    path = Path(RESULTS, f"{found['date']}-snapshots.json")
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"→ {path}")


if __name__ == "__main__":
    main()
