"""What hot snapshots cost: steps of a recipe's model, and how much longer those take that follow a snapshot.

    python -m benchmarks.snapshots              # a ViT-B, on the GPU if there is one

Images are on the device already, so that nothing but steps and snapshots takes time. A snapshot is taken each EACH
steps, which is more often than training does. The first AFTER steps with it and after it, in which it is copied and
written, are compared with the median of the others around them: what they take longer is its cost. Reported is that
cost over the time of the steps between two snapshots, as training would choose them; and the bytes they keep.
"""

import datetime
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

from benchmarks.report import RESULTS, cpu_model
from pipeline.cores import available_cores
from pipeline.storage import open_store
from trainer.bench import resident_batch
from trainer.config import PretrainConfig
from trainer.mae import MAE
from trainer.optim import adamw
from trainer.pretrain import pretrain_step
from trainer.recipe import load_config
from trainer.run import Run
from trainer.snapshot import STATE, Snapshots

EACH, AFTER = 8, 3  # steps


def measure(config: PretrainConfig, run: Run, taken: int) -> dict[str, Any]:
    """Seconds of a step, what a snapshot costs of them, and how often training would take one."""
    torch.manual_seed(0)
    model = MAE(config.model).to(run.device)
    optimizer = adamw(model, config.optim)
    batch = resident_batch(config, run.device)
    snapshots = Snapshots(run, config, 0)
    optimizer.register_step_pre_hook(lambda *_: snapshots.before_update())

    def step(nth: int, hot: bool) -> float:
        begin = time.perf_counter()
        pretrain_step(model, optimizer, batch, config, run)
        if hot:
            snapshots.take(nth, model, optimizer, [], 0)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return time.perf_counter() - begin

    for nth in range(1, 1 + EACH):  # memory is had, and what one costs is known
        step(nth, hot=nth in (1, EACH // 2))
    costs, plain, between = [], [], []
    for nth in track(range(1 + EACH, 1 + EACH * (1 + taken)), "steps"):
        hot = nth % EACH == 0
        seconds = step(nth, hot)
        if hot:
            between.append(snapshots.next - nth)
            costs.append([seconds])
        elif costs and len(costs[-1]) < AFTER:
            costs[-1].append(seconds)
        else:
            plain.append(seconds)
    assert snapshots.folder is not None
    size = (snapshots.folder / STATE).stat().st_size
    snapshots.close()
    step_s = statistics.median(plain)
    cost_s = statistics.median(sum(group) - len(group) * step_s for group in costs if len(group) == AFTER)
    return {
        "step_s": step_s,
        "cost_s": cost_s,
        "costs_s": [sum(group) - len(group) * step_s for group in costs],
        "steps between two": statistics.median(between),
        "bytes": size,
        "share": cost_s / (statistics.median(between) * step_s),
    }


@click.command()
@click.option("--recipe", default="recipes/pretrain_vit_base.yaml", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--snapshots", "taken", default=12, show_default=True, help="So many are taken.")
def main(recipe: str, batch: int, taken: int) -> None:
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
            **measure(config, run, taken),
        }
    console.print(
        f"a step takes {found['step_s']:.2f} s, a snapshot {found['cost_s']:.2f} s of the steps, and is taken each "
        f"{found['steps between two']:.0f} steps: {found['share']:.1%}; {found['bytes'] / 1e9:.2f} GB"
    )
    path = Path(RESULTS, f"{found['date']}-snapshots.json")
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"→ {path}")


if __name__ == "__main__":
    main()
