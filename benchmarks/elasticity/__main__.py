"""Measure the cost of failing, leaving and joining workers and nodes: `maestream pretrain` and stock Ray Train.

    python -m benchmarks.elasticity [--scenario "node killed"]… [--side "in place"]… [--compile-s 30]

Each scenario starts a new Ray cluster on this machine (a head without CPUs and nodes with one CPU each), trains the same
small MAE in float64 with as many workers as there are CPUs, up to three, and injects a fault after FAULT_STEPS steps.

- "in place" is the command itself. It runs to its end. Its final parameters must match those of an uninterrupted run in a
  single process, and each step must have had the samples that the order says.
- "restart" is the same command, but a change restarts all workers from a snapshot (`benchmarks.elasticity.modified`).
- "stock" is `benchmarks.elasticity.stock_ray`: a checkpoint every 10 steps, and Ray's defaults.

The last two are stopped when they have recovered, and their losses must match as well. All are measured in the same way:
rank 0 appends a row per step to a file, and this process records when.

- pause: seconds from the last step of a group of workers to the first step of the next, minus one step; one number for each
  change. The first is the fault's. Others are of workers or nodes that come back.
- repeated: steps that had been done before the fault and were done again.
- kept: workers whose process is the same after the fault.

--compile-s simulates that each worker process compiles the model for so long when it first runs it, with nothing cached.

All nodes on one machine share its /dev/shm, where our snapshots are, so the snapshots of a killed node are deleted.
Results go to benchmarks/results/<date>-elasticity.md and .json. All scenarios take about 90 minutes, and the machine must have
nothing else to do.
"""

import contextlib
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
import yaml
from rich.console import Console

from benchmarks.elasticity import faults
from benchmarks.elasticity.checks import ledger_is_exact, parameters_apart
from benchmarks.elasticity.faults import FaultTarget, SideJob, run_id
from benchmarks.elasticity.partition import Link
from benchmarks.elasticity.ray_cluster import RayCluster
from benchmarks.elasticity.report import Outcome, verdicts, write_report
from benchmarks.elasticity.scenarios import SCENARIOS, SIDES, Scenario
from benchmarks.elasticity.step_log import Step, cost
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.storage.store import open_store
from trainer.config.recipe import load_config
from trainer.config.schema import PretrainConfig
from trainer.run.metrics import read_metrics
from trainer.run.run import create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.train.pretrain import pretrain

EXPLAINED = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].rpartition("\n")[0]
SAMPLES, BATCH, TOTAL_STEPS = 480, 48, 600
FAULT_STEPS = 65  # halfway between two checkpoints of stock, and after a checkpoint of ours
COMMIT_STEPS = 50
AFTER_STEPS = 20  # a side has recovered after so many new steps
HEAD = {  # settings of Ray's head, as docs/guides/elastic.md recommends
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
RECIPE = {
    "global_batch": BATCH,
    "micro_batch": 1,  # so that a step takes some time although the model is small
    "epochs": TOTAL_STEPS * BATCH / SAMPLES,
    "precision": "float64",
    "log_every": 1,
    "checkpoint": {"every_steps": COMMIT_STEPS},
    "model": {
        "image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 4,
        "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4,
    },
    "optim": {"blr": 0.005, "warmup_epochs": 2},
    "data": {"lanes": 12, "block": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What all scenarios share."""

    folder: Path
    recipe: Path
    data: str
    reference: Path  # the run of a single process
    losses: list[float]  # of its steps
    compile_s: float


def set_up(folder: Path, compile_s: float, console: Console) -> Setup:
    """Make dataset, recipe and uninterrupted run; those from an earlier call are used again."""
    from pipeline.build.build import build
    from pipeline.build.shard_writer import BuildOptions

    folder.mkdir(parents=True, exist_ok=True)
    recipe, data, reference = folder / "recipe.yaml", folder / "data", folder / "reference"
    recipe.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    if not (data / "manifest.json").exists():
        build(
            f"synthetic:?count={SAMPLES}&classes=7", open_store(str(data)), BuildOptions(shard_bytes=1 << 20)
        )
    console.print(
        f"reference run: a single process, {TOTAL_STEPS} steps (1 to 2 minutes, unless it exists already)"
    )
    train_alone(recipe, open_dataset(str(data)), reference)
    losses = [row["loss"] for row in read_metrics(open_store(str(reference)))]
    return Setup(folder, recipe, str(data), reference, losses, compile_s)


def train_alone(recipe: Path, dataset: Dataset, out: Path) -> None:
    torch.set_num_threads(1)  # with other processes running, two threads are slower than one
    alone = ("log_every=20", "checkpoint.snapshots=null")
    config, run = open_run(str(out), load_config(PretrainConfig, recipe, alone), dataset)
    create_run(config, run, dataset)
    pretrain(config, dataset, run, Worker(), Callbacks())


def command(side: str, setup: Setup, out: Path) -> list[str]:
    """The command of one side."""
    compile_s, python = str(setup.compile_s), [sys.executable, "-m"]
    if side == "stock":
        return [
            *python,
            "benchmarks.elasticity.stock_ray",
            str(setup.recipe),
            setup.data,
            str(out),
            compile_s,
        ]
    pretrain = ["pretrain", "--config", str(setup.recipe), "--data", setup.data, "--out", str(out), "--ledger",
                "workers={min: 1, max: 3}"]  # fmt: skip
    if side == "in place" and not setup.compile_s:
        return [str(Path(sys.executable).with_name("maestream")), *pretrain]
    restart = ["--restart"] if side == "restart" else []
    return [*python, "benchmarks.elasticity.modified", *restart, "--compile-s", compile_s, *pretrain]


@contextlib.contextmanager
def started(side: str, scenario: Scenario, setup: Setup) -> Iterator[FaultTarget]:
    """A cluster with the command of one side running on it."""
    out = setup.folder / f"{side.replace(' ', '-')}-{scenario.inject.__name__}"
    logs = out.with_suffix(".logs")
    for old in (out, logs):
        shutil.rmtree(old, ignore_errors=True)
    out.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(Link()) if scenario.beyond_link else None
        cluster = stack.enter_context(RayCluster(logs, {} if side == "stock" else HEAD, link))
        cluster.add(scenario.nodes - scenario.beyond_link)
        if scenario.beyond_link:
            cluster.add_beyond_link()
        job = SideJob(side, command(side, setup, out), out, logs / "job.log", cluster.environment())
        try:
            yield FaultTarget(cluster, job)
        finally:
            job.watch.close()
            shutil.rmtree(f"/dev/shm/maestream-{run_id(out)}", ignore_errors=True)


def run_side(side: str, scenario: Scenario, setup: Setup) -> Outcome:
    """Run one side of a scenario."""
    with started(side, scenario, setup) as target:
        job, fault_at, kept, apart, exact, failure = target.job, math.inf, 0, None, None, ""
        try:
            job.wait_for_steps(lambda steps: len(steps) >= FAULT_STEPS, f"{FAULT_STEPS} steps")
            workers, last, fault_at = target.workers(), job.watch.steps[-1], time.monotonic()
            scenario.inject(target)
            done_at = time.monotonic()

            def recovered(steps: list[Step]) -> bool:
                new = [
                    s for s in steps if s.attempt != last.attempt and s.step > last.step and s.at > done_at
                ]
                return len([s for s in new if scenario.ends_with in (None, s.world_size)]) >= AFTER_STEPS

            job.wait_for_steps(recovered, "recovery")
            kept = len(workers & target.workers())
            if side == "in place":
                if job.process.wait(faults.PATIENCE_S + TOTAL_STEPS):
                    job.check_alive()
                apart = parameters_apart(job.out, setup.reference)
                exact = ledger_is_exact(job.out, setup.recipe, setup.data, TOTAL_STEPS)
            else:
                apart = max(abs(s.loss - setup.losses[s.step]) for s in job.watch.steps)
        except (TimeoutError, RuntimeError, StopIteration, subprocess.SubprocessError) as error:
            failure = f"{type(error).__name__}: {error}"
        others = round(statistics.mean(job.watch.others or [0]), 1)
        found = None if fault_at == math.inf else cost(list(job.watch.steps), fault_at)
        return Outcome(found, kept, apart, exact, failure, others)


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option(
    "--scenario",
    "titles",
    multiple=True,
    metavar="TEXT",
    help="Only scenarios whose title begins with TEXT. Repeatable.",
)
@click.option(
    "--side",
    "sides",
    multiple=True,
    type=click.Choice(SIDES),
    help="Only this side. Repeatable.  [default: all]",
)
@click.option("--compile-s", default=0.0, help="Simulate a compilation of so many seconds.")
@click.option(
    "--folder", default="runs/bench-elasticity", help="Folder for data and runs.", show_default=True
)
def main(titles: tuple[str, ...], sides: tuple[str, ...], compile_s: float, folder: str) -> None:
    console = Console()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that the clean-up runs and leaves no process behind
    setup = set_up(Path(folder).resolve(), compile_s, console)
    chosen = [s for s in SCENARIOS if not titles or s.title.startswith(titles)]
    result = {}
    for scenario in chosen:
        outcomes = {}
        for side in (side for side in scenario.sides if side in (sides or SIDES)):
            begin = time.monotonic()
            outcomes[side] = run_side(side, scenario, setup)
            console.print(f"{scenario.title}, {side}: {outcomes[side]} ({time.monotonic() - begin:.0f} s)")
        judged = verdicts(scenario.limits, outcomes["in place"]) if "in place" in outcomes else {}
        result[scenario.title] = {**{k: asdict(v) for k, v in outcomes.items()}, "requirements": judged}
    name = f"elasticity-compile-{compile_s:g}" if compile_s else "elasticity"
    write_report(name, result, None if titles or sides else EXPLAINED, console)


if __name__ == "__main__":
    main()
