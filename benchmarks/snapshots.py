"""Measure the cost of snapshots: how much longer the steps of a recipe's model take because of them.

    python -m benchmarks.snapshots              # a ViT-B, on the GPU if there is one

Images are on the device already, so only steps and snapshots take time. A snapshot is taken every EACH steps, more often
than in training. It is copied and written during AFTER steps; the extra time of these steps over the median of the others
is its cost. The report gives this cost as a share of the time between two snapshots at the interval that training would
choose, and the size of a snapshot.
"""

import datetime
import statistics
import sys
import tempfile
import time
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.output import save_result
from pipeline.cpus import available_cores
from pipeline.loading.benchmark import cpu_model
from pipeline.storage.store import open_store
from trainer.config.recipe import load_config
from trainer.config.schema import PretrainConfig
from trainer.group.group import Group
from trainer.models.mae import MAE
from trainer.run.run import Run
from trainer.run.snapshot import STATE, Snapshots, node_number
from trainer.run.worker import Worker
from trainer.step.optim import adamw
from trainer.step.step import wrap_for_training
from trainer.train.benchmark import resident_batch
from trainer.train.pretrain import pretrain_step

EACH, AFTER = 8, 3  # steps


def measure(config: PretrainConfig, run: Run, worker: Worker, taken: int) -> dict[str, Any]:
    """Measure the seconds of a step, the cost of a snapshot, and the interval that training would choose."""
    torch.manual_seed(0)
    model = MAE(config.model).to(worker.device)
    optimizer = adamw(model, config.optim)
    batch = resident_batch(config, worker.device)
    trained = wrap_for_training(model, config, worker)
    snapshots = Snapshots(worker, config)
    snapshots.begin(run, [node_number(worker.node)], 0)
    optimizer.register_step_pre_hook(lambda *_: snapshots.wait_for_copy())

    def step(nth: int, hot: bool) -> float:
        begin = time.perf_counter()
        pretrain_step(trained, optimizer, batch, config, worker)
        if hot:
            snapshots.take(nth, model, optimizer, [])
        if worker.device.type == "cuda":
            torch.cuda.synchronize(worker.device)
        return time.perf_counter() - begin

    for nth in range(1, 1 + EACH):  # warm-up: allocates memory, and lets `Snapshots` measure the cost
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


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--recipe", default="recipes/pretrain_vit_base.yaml", show_default=True, help="Model to train.")
@click.option("--batch", default=8, show_default=True, help="Images in a batch.")
@click.option(
    "--snapshots",
    "taken",
    type=click.IntRange(min=2),
    default=12,
    show_default=True,
    help="Number of snapshots to take.",
)
def main(recipe: str, batch: int, taken: int) -> None:
    console = Console(highlight=False)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    config = load_config(PretrainConfig, recipe, (f"global_batch={batch}", "data.lanes=1"))
    with tempfile.TemporaryDirectory(prefix="maestream-bench-") as folder:
        run = Run(open_store(folder), "benchmark", 1)
        found = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python -m benchmarks.snapshots", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
            "cores": available_cores(),
            "recipe": recipe,
            "batch": batch,
            **measure(config, run, Worker(Group(device)), taken),
        }
    console.print(
        f"step {found['step_s']:.2f} s; a snapshot ({found['bytes'] / 1e9:.2f} GB) costs {found['cost_s']:.2f} s, and with one "
        f"every {found['steps between two']:.0f} steps training takes {found['share']:.1%} longer"
    )
    console.print(save_result(f"{found['date']}-snapshots", found))


if __name__ == "__main__":
    main()
