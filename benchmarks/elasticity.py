"""What it costs when workers and nodes come and go: `maestream pretrain` beside stock Ray Train, with the same faults.

    python -m benchmarks.elasticity [--scenario "raylet SIGKILL"]… [--no-stock]

Each scenario starts a fresh cluster on this machine (a head without CPUs, nodes of one CPU, see benchmarks.raylets),
trains the same small MAE in float64 with as many workers as there are, up to three, does something to the cluster after
HIT_STEPS steps, and goes on. Ours is the command itself; stock is benchmarks.stock: a checkpoint each 10 steps, all else
as Ray has it. Ours commits each COMMIT_STEPS steps and is left to finish: then its parameters have to be those of a
single process that nothing disturbed. Stock is stopped when it has recovered: its losses have to be the same.

Both are watched in the same way, from without: rank 0 appends a row a step to a file, and this process notes when.

- gap: seconds without any step, from the last one of a group of workers to the first of the next; if there is more
  than one restart, the sum.
- redone: steps that were done before, and had to be done again.
- lost: seconds from the last step before to the first that had not been done before: the gap, and what was redone.

All raylets of a machine share its /dev/shm, where our snapshots are: whatever a killed node has there is deleted.
Results go to benchmarks/results/<date>-elasticity.md and .json; a first run of ten scenarios takes 55 minutes.
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

from benchmarks import faults
from benchmarks.elasticity_report import Bars, Outcome, verdicts, write_report
from benchmarks.faults import Job, Stage, run_id
from benchmarks.raylets import Raylets
from benchmarks.steps import Step, cost
from pipeline.manifest import Dataset, open_dataset
from pipeline.storage import open_store
from trainer.config import PretrainConfig
from trainer.metrics import read_metrics
from trainer.pretrain import pretrain
from trainer.recipe import load_config
from trainer.run import Run, found_run, open_run

EXPLAINED = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].rpartition("\n")[0]
SAMPLES, BATCH, TOTAL_STEPS = 480, 48, 600
HIT_STEPS = 65  # between two checkpoints of stock, and after a commit of ours
COMMIT_STEPS = 50
AFTER_STEPS = 20  # new steps, and it has recovered
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
    "micro_batch": 1,  # so that a step takes its time, though the state is small
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
    title: str
    hit: Callable[[Stage], None]
    bars: Bars
    nodes: int = 3
    ends_with: int | None = None  # it has recovered with so many workers; None: with any number


SCENARIOS = (
    Scenario("worker SIGKILL", faults.kill_worker, Bars(redone=10, of_stock=1)),
    Scenario("worker SIGSTOP", faults.stop_worker, Bars(gap_s=30)),
    Scenario("raylet SIGKILL", faults.kill_raylet, Bars(redone=10, of_stock=1 / 3)),
    Scenario("raylet SIGKILL, rank 0's", faults.kill_leaders_raylet, Bars(redone=10, of_stock=1 / 3)),
    Scenario(f"drain, {faults.NOTICE_S} s notice", faults.give_notice, Bars(redone=0)),
    Scenario("SIGTERM of ray start --block", faults.terminate_node, Bars(redone=0)),
    Scenario("node added", faults.add_node, Bars(redone=0), nodes=2, ends_with=3),
    Scenario("all nodes lost, others come", faults.lose_all_nodes, Bars(redone=COMMIT_STEPS)),
    Scenario("driver SIGKILL, same command", faults.kill_driver, Bars()),
    Scenario("job stop, same command", faults.stop_job, Bars(redone=0)),
)


@dataclass(frozen=True)
class Setup:
    folder: Path
    recipe: Path
    data: str
    reference: Path  # the run of a single process
    losses: list[float]  # of its steps


def set_up(folder: Path, console: Console) -> Setup:
    """Dataset, recipe, and the run that nothing disturbs; what is there already is used again."""
    from pipeline.shards import build
    from pipeline.write import Options

    folder.mkdir(parents=True, exist_ok=True)
    recipe, data, reference = folder / "recipe.yaml", folder / "data", folder / "reference"
    recipe.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    if not (data / "manifest.json").exists():
        build(f"synthetic:?count={SAMPLES}&classes=7", open_store(str(data)), Options(shard_bytes=1 << 20))
    console.print(
        f"a single process, {TOTAL_STEPS} steps (1 to 2 minutes, unless it is there from the last time)"
    )
    train_alone(recipe, open_dataset(str(data)), reference)
    losses = [row["loss"] for row in read_metrics(open_store(str(reference)))]
    return Setup(folder, recipe, str(data), reference, losses)


def train_alone(recipe: Path, dataset: Dataset, out: Path) -> None:
    torch.set_num_threads(1)  # two that other processes disturb are slower than one
    alone = ("log_every=20", "checkpoint.snapshots=null")
    config, run = open_run(str(out), load_config(PretrainConfig, recipe, alone), dataset)
    found_run(config, run, dataset)
    pretrain(config, dataset, Run(run.store, run.run_id, run.attempt))


@contextlib.contextmanager
def started(side: str, scenario: Scenario, setup: Setup) -> Iterator[Stage]:
    """A cluster, and the command of one side on it."""
    out = setup.folder / f"{side}-{scenario.hit.__name__}"
    logs = out.with_suffix(".logs")
    for old in (out, logs):
        shutil.rmtree(old, ignore_errors=True)
    words = {
        "ours": [str(Path(sys.executable).with_name("maestream")), "pretrain", "--config", str(setup.recipe),
                 "--data", setup.data, "--out", str(out), "workers={min: 1, max: 3}"],
        "stock": [sys.executable, "-m", "benchmarks.stock", str(setup.recipe), setup.data, str(out)],
    }  # fmt: skip
    out.mkdir(parents=True)
    with Raylets(logs, HEAD[side]) as cluster:
        cluster.add(scenario.nodes)
        job = Job(side, words[side], out, logs / "job.log", cluster.environment())
        try:
            yield Stage(cluster, job)
        finally:
            job.watch.close()
            shutil.rmtree(f"/dev/shm/maestream-{run_id(out)}", ignore_errors=True)


def play(side: str, scenario: Scenario, setup: Setup) -> Outcome:
    """One side of a scenario."""
    with started(side, scenario, setup) as stage:
        job, hit_at, apart, failure = stage.job, math.inf, None, ""
        try:
            job.wait_for_steps(lambda steps: len(steps) >= HIT_STEPS, f"{HIT_STEPS} steps")
            last, hit_at = job.watch.steps[-1], time.monotonic()
            scenario.hit(stage)
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
        found = None if hit_at == math.inf else cost(job.watch.steps, hit_at)
        return Outcome(found, apart, failure, others)


def parameters_apart(out: Path, reference: Path) -> float:
    """The largest difference between the final parameters of two runs."""
    from safetensors.torch import load_file

    name = f"checkpoints/step-{TOTAL_STEPS:08d}/model.safetensors"
    ours, theirs = load_file(out / name), load_file(reference / name)
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option(
    "--scenario", "titles", multiple=True, metavar="WORDS", help="Only those with WORDS in their title."
)
@click.option("--stock/--no-stock", default=True, help="Stock Ray Train beside it.")
@click.option("--folder", default="runs/bench-elasticity", help="For data and runs.", show_default=True)
def main(titles: tuple[str, ...], stock: bool, folder: str) -> None:
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing may be left running
    setup = set_up(Path(folder).resolve(), console)
    chosen = [s for s in SCENARIOS if not titles or any(words in s.title for words in titles)]
    result = {}
    for scenario in chosen:
        outcomes = {}
        for side in ("ours", "stock") if stock else ("ours",):
            begin = time.monotonic()
            outcomes[side] = play(side, scenario, setup)
            console.print(f"{scenario.title}, {side}: {outcomes[side]} ({time.monotonic() - begin:.0f} s)")
        judged = verdicts(scenario.bars, outcomes["ours"], outcomes.get("stock"))
        result[scenario.title] = {**{k: asdict(v) for k, v in outcomes.items()}, "bars": judged}
    write_report(result, None if titles else EXPLAINED, console)


if __name__ == "__main__":
    main()
