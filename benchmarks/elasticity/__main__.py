"""Measure the cost of failing, leaving and joining workers and nodes: `maestream pretrain` and stock Ray Train.

    python -m benchmarks.elasticity [--scenario "raylet SIGKILL"]… [--no-stock]

Each scenario starts a new Ray cluster on this machine (a head without CPUs and nodes with one CPU each), trains the same
small MAE in float64 with as many workers as there are CPUs, up to three, and injects a fault after FAULT_STEPS steps.
"ours" is the command itself, with a checkpoint every COMMIT_STEPS steps. It runs to its end, and its final parameters
must match those of an uninterrupted run in a single process. "stock" is `benchmarks.elasticity.stock_ray`: a checkpoint
every 10 steps, and Ray's defaults. It is stopped when it has recovered, and its losses must match as well.

Both sides are measured in the same way: rank 0 appends a row per step to a file, and this process records when.

- gap: seconds without any step, from the last step of a group of workers to the first step of the next; with more than
  one restart, the sum.
- redone: steps that had been done before the fault and were done again.
- lost: seconds from the last step before the fault to the first step that had not been done before: the gap plus the
  redone steps.

All nodes on one machine share its /dev/shm, where our snapshots are, so the snapshots of a killed node are deleted.
Results go to benchmarks/results/<date>-elasticity.md and .json. Ten scenarios take 55 minutes.
"""

import contextlib
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
import yaml
from rich.console import Console

from benchmarks.elasticity import faults
from benchmarks.elasticity.faults import FaultTarget, SideJob, run_id
from benchmarks.elasticity.ray_cluster import RayCluster
from benchmarks.elasticity.report import Limits, Outcome, verdicts, write_report
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
HEAD = {
    "ours": {
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    },
    "stock": {},
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
class Scenario:
    """A fault, and what our side must achieve."""

    title: str
    inject: Callable[[FaultTarget], None]
    limits: Limits
    nodes: int = 3
    ends_with: int | None = None  # world size of a recovered run; None: any


SCENARIOS = (
    Scenario("worker SIGKILL", faults.kill_worker, Limits(redone=10, of_stock=1)),
    Scenario("worker SIGSTOP", faults.stop_worker, Limits(gap_s=30)),
    Scenario("raylet SIGKILL", faults.kill_raylet, Limits(redone=10, of_stock=1 / 3)),
    Scenario("raylet SIGKILL, rank 0's", faults.kill_leaders_raylet, Limits(redone=10, of_stock=1 / 3)),
    Scenario(f"drain, {faults.NOTICE_S} s notice", faults.send_preemption_notice, Limits(redone=0)),
    Scenario("SIGTERM of ray start --block", faults.terminate_node, Limits(redone=0)),
    Scenario("node added", faults.add_node, Limits(redone=0), nodes=2, ends_with=3),
    Scenario("all nodes lost, others come", faults.lose_all_nodes, Limits(redone=COMMIT_STEPS)),
    Scenario("driver SIGKILL, same command", faults.kill_driver, Limits()),
    Scenario("job stop, same command", faults.stop_job, Limits(redone=0)),
)


@dataclass(frozen=True)
class Setup:
    """What all scenarios share."""

    folder: Path
    recipe: Path
    data: str
    reference: Path  # the run of a single process
    losses: list[float]  # of its steps


def set_up(folder: Path, console: Console) -> Setup:
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
    return Setup(folder, recipe, str(data), reference, losses)


def train_alone(recipe: Path, dataset: Dataset, out: Path) -> None:
    torch.set_num_threads(1)  # with other processes running, two threads are slower than one
    alone = ("log_every=20", "checkpoint.snapshots=null")
    config, run = open_run(str(out), load_config(PretrainConfig, recipe, alone), dataset)
    create_run(config, run, dataset)
    pretrain(config, dataset, run, Worker(), Callbacks())


@contextlib.contextmanager
def started(side: str, scenario: Scenario, setup: Setup) -> Iterator[FaultTarget]:
    """A cluster with the command of one side running on it."""
    out = setup.folder / f"{side}-{scenario.inject.__name__}"
    logs = out.with_suffix(".logs")
    for old in (out, logs):
        shutil.rmtree(old, ignore_errors=True)
    words = {
        "ours": [str(Path(sys.executable).with_name("maestream")), "pretrain", "--config", str(setup.recipe),
                 "--data", setup.data, "--out", str(out), "workers={min: 1, max: 3}"],
        "stock": [sys.executable, "-m", "benchmarks.elasticity.stock_ray", str(setup.recipe), setup.data, str(out)],
    }  # fmt: skip
    out.mkdir(parents=True)
    with RayCluster(logs, HEAD[side]) as cluster:
        cluster.add(scenario.nodes)
        job = SideJob(side, words[side], out, logs / "job.log", cluster.environment())
        try:
            yield FaultTarget(cluster, job)
        finally:
            job.watch.close()
            shutil.rmtree(f"/dev/shm/maestream-{run_id(out)}", ignore_errors=True)


def run_side(side: str, scenario: Scenario, setup: Setup) -> Outcome:
    """Run one side of a scenario."""
    with started(side, scenario, setup) as target:
        job, fault_at, apart, failure = target.job, math.inf, None, ""
        try:
            job.wait_for_steps(lambda steps: len(steps) >= FAULT_STEPS, f"{FAULT_STEPS} steps")
            last, fault_at = job.watch.steps[-1], time.monotonic()
            scenario.inject(target)
            done_at = time.monotonic()

            def recovered(steps: list[Step]) -> bool:
                new = [
                    s for s in steps if s.attempt != last.attempt and s.step > last.step and s.at > done_at
                ]
                return len([s for s in new if scenario.ends_with in (None, s.world_size)]) >= AFTER_STEPS

            job.wait_for_steps(recovered, "recovery")
            if side == "ours":
                if job.process.wait(faults.PATIENCE_S + TOTAL_STEPS):
                    job.check_alive()
                apart = parameters_apart(job.out, setup.reference)
            else:
                apart = max(abs(s.loss - setup.losses[s.step]) for s in job.watch.steps)
        except (TimeoutError, RuntimeError, StopIteration, subprocess.SubprocessError) as error:
            failure = f"{type(error).__name__}: {error}"
        others = round(statistics.mean(job.watch.others or [0]), 1)
        found = None if fault_at == math.inf else cost(job.watch.steps, fault_at)
        return Outcome(found, apart, failure, others)


def parameters_apart(out: Path, reference: Path) -> float:
    """The largest difference between the final parameters of two runs."""
    from safetensors.torch import load_file

    name = f"checkpoints/step-{TOTAL_STEPS:08d}/model.safetensors"
    ours, theirs = load_file(out / name), load_file(reference / name)
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option(
    "--scenario",
    "titles",
    multiple=True,
    metavar="TEXT",
    help="Only scenarios whose title contains TEXT. Repeatable.",
)
@click.option("--stock/--no-stock", default=True, help="Also run stock Ray Train.")
@click.option(
    "--folder", default="runs/bench-elasticity", help="Folder for data and runs.", show_default=True
)
def main(titles: tuple[str, ...], stock: bool, folder: str) -> None:
    console = Console()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that the clean-up runs and leaves no process behind
    setup = set_up(Path(folder).resolve(), console)
    chosen = [s for s in SCENARIOS if not titles or any(words in s.title for words in titles)]
    result = {}
    for scenario in chosen:
        outcomes = {}
        for side in ("ours", "stock") if stock else ("ours",):
            begin = time.monotonic()
            outcomes[side] = run_side(side, scenario, setup)
            console.print(f"{scenario.title}, {side}: {outcomes[side]} ({time.monotonic() - begin:.0f} s)")
        judged = verdicts(scenario.limits, outcomes["ours"], outcomes.get("stock"))
        result[scenario.title] = {**{k: asdict(v) for k, v in outcomes.items()}, "bars": judged}
    write_report(result, None if titles else EXPLAINED, console)


if __name__ == "__main__":
    main()
