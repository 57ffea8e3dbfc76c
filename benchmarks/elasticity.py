"""What it costs when workers and nodes come and go: `maestream pretrain` beside stock Ray Train, with the same faults.

    python -m benchmarks.elasticity [--scenario "raylet killed"]… [--no-stock]

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
Results go to benchmarks/results/<date>-elasticity.md and .json; a first run of ten scenarios takes 45 minutes.
"""

import contextlib
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import click
import torch
import yaml
from rich.console import Console

from benchmarks.elasticity_report import Bars, Cost, Outcome, verdicts, write_report
from benchmarks.raylets import ROOT, Node, Raylets, descendants, has_open, kill, running_others, wait_until
from benchmarks.stock import STEPS
from pipeline.manifest import Dataset, open_dataset
from pipeline.storage import open_store
from trainer.config import PretrainConfig, load_config
from trainer.metrics import METRICS, read_metrics
from trainer.pretrain import pretrain
from trainer.run import Run, found_run, open_run

EXPLAINED = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].rpartition("\n")[0]
SAMPLES, BATCH, TOTAL_STEPS = 480, 48, 600
HIT_STEPS = 65  # between two checkpoints of stock, and after a commit of ours
COMMIT_STEPS = 50
AFTER_STEPS = 20  # new steps, and it has recovered
PATIENCE_S = 240.0  # for a recovery, before it counts as none
NOTICE_S = 30  # as GCP and Azure give, and `ray start` on SIGTERM
STOP_S = {"ours": 60.0, "stock": 3.0}  # RAY_JOB_STOP_WAIT_TIME_S: as our README says, and as Ray has it
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


# ---- watching


@dataclass(frozen=True)
class Step:
    at: float  # time.monotonic, when it was seen
    attempt: int
    step: int
    world_size: int
    loss: float


class Watch:
    """Reads the file that gets a row a step, as it grows.

    `steps` has each (attempt, step) once, in order; `others`, for each second, how many processes besides this benchmark's
    wanted a core.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[Step] = []
        self.others: list[int] = []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._read, name="watch", daemon=True)
        self.thread.start()
        threading.Thread(target=self._look_around, name="others", daemon=True).start()

    def _look_around(self) -> None:
        while not self.ending.wait(1):
            self.others.append(len(running_others()))

    def _read(self) -> None:
        seen: set[tuple[int, int]] = set()
        while not self.path.exists():
            if self.ending.wait(0.02):
                return
        with self.path.open() as file:
            part = ""
            while not self.ending.wait(0.02):
                *lines, part = (part + file.read()).split("\n")
                at = time.monotonic()
                for line in lines:
                    with contextlib.suppress(ValueError):  # a line that a kill cut short
                        row = json.loads(line)
                        if (row["attempt"], row["step"]) not in seen:
                            seen.add((row["attempt"], row["step"]))
                            self.steps.append(
                                Step(at, row["attempt"], row["step"], row["world_size"], row["loss"])
                            )

    def close(self) -> None:
        self.ending.set()
        self.thread.join()


def cost(steps: list[Step], hit_at: float) -> Cost:
    """What a fault at `hit_at` has cost."""
    untouched = [step for step in steps if step.at <= hit_at]
    sizes, gap_s, lost_s, redone = [untouched[-1].world_size], 0.0, 0.0, 0
    furthest, lost_since = untouched[-1].step, None
    for before, now in pairwise(steps[len(untouched) - 1 :]):
        if now.attempt != before.attempt:
            gap_s += now.at - before.at
            sizes.append(now.world_size)
            lost_since = before.at if lost_since is None else lost_since
        if now.step <= furthest:
            redone += 1
        elif lost_since is not None:
            lost_s, lost_since = lost_s + now.at - lost_since, None
        furthest = max(furthest, now.step)
    rate = (len(untouched) - 1) / (untouched[-1].at - untouched[0].at)
    return Cost(sizes, len(sizes) - 1, round(gap_s, 1), redone, round(lost_s, 1), round(rate, 1))


# ---- what is done to a cluster


class Job:
    """The command of one side, which can be stopped and started again.

    Args:
        out: its folder; it is empty.
    """

    def __init__(
        self, side: str, command: list[str], out: Path, log: Path, environment: dict[str, str]
    ) -> None:
        self.side, self.command, self.out, self.log, self.environment = side, command, out, log, environment
        self.watch = Watch(out / (METRICS if side == "ours" else STEPS))
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=self.environment,
                cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"it ended with {self.process.returncode}: {self.log.read_text()[-1500:]}")

    def wait_for_steps(self, enough: Callable[[list[Step]], bool], what: str) -> None:
        def look() -> bool:
            if enough(self.watch.steps):
                return True
            self.check_alive()
            return False

        wait_until(look, PATIENCE_S, what)


@dataclass(frozen=True)
class Stage:
    """What a fault is given."""

    cluster: Raylets
    job: Job

    def leader(self) -> int:
        """Pid of rank 0: it alone writes."""
        workers = [pid for node in self.cluster.nodes for pid in node.train_workers()]
        return next(pid for pid in workers if has_open(pid, self.job.out))

    def node(self, of_leader: bool) -> Node:
        """Rank 0's node, or another."""
        leader = self.leader()
        return next(n for n in self.cluster.nodes if (leader in descendants(n.raylet)) == of_leader)

    def follower(self) -> int:
        """Pid of a worker that is not rank 0."""
        return self.node(of_leader=False).train_workers()[0]

    def forget(self, *nodes: Node) -> None:
        """Delete the snapshots of nodes that are gone."""
        for node in nodes:
            for folder in Path("/dev/shm").glob(f"maestream-{run_id(self.job.out)}/{node.node_id}"):
                shutil.rmtree(folder)

    def kill_node(self, node: Node) -> None:
        self.cluster.kill(node)
        self.forget(node)


def run_id(out: Path) -> str:
    """Stock has none."""
    path = out / "run.json"
    return str(json.loads(path.read_text())["run_id"]) if path.exists() else "none"


def kill_worker(stage: Stage) -> None:
    kill(stage.follower())


def stop_worker(stage: Stage) -> None:
    kill(stage.follower(), sig=signal.SIGSTOP)


def kill_raylet(stage: Stage) -> None:
    stage.kill_node(stage.node(of_leader=False))


def kill_leaders_raylet(stage: Stage) -> None:
    stage.kill_node(stage.node(of_leader=True))


def give_notice(stage: Stage) -> None:
    """As a cloud: the node is gone when the time is over, whether it has been left or not."""
    node, begin = stage.node(of_leader=True), time.monotonic()
    stage.cluster.notice(node, NOTICE_S)
    time.sleep(begin + NOTICE_S - time.monotonic())
    stage.kill_node(node)


def terminate_node(stage: Stage) -> None:
    node = stage.node(of_leader=True)
    stage.cluster.terminate(node, NOTICE_S + 10)
    stage.forget(node)


def add_node(stage: Stage) -> None:
    stage.cluster.add()


def lose_all_nodes(stage: Stage) -> None:
    gone = list(stage.cluster.nodes)
    kill(*(node.raylet for node in gone))
    for node in gone:
        stage.cluster.kill(node)
    stage.forget(*gone)
    stage.cluster.add(len(gone))


def kill_driver(stage: Stage) -> None:
    stage.job.process.kill()
    stage.job.process.wait()
    stage.job.start()


def stop_job(stage: Stage) -> None:
    stage.job.process.terminate()
    try:
        stage.job.process.wait(STOP_S[stage.job.side])
    except subprocess.TimeoutExpired:
        stage.job.process.kill()
        stage.job.process.wait()
    stage.job.start()


@dataclass(frozen=True)
class Scenario:
    title: str
    hit: Callable[[Stage], None]
    bars: Bars
    nodes: int = 3
    ends_with: int | None = None  # it has recovered with so many workers; None: with any number


SCENARIOS = (
    Scenario("worker SIGKILL", kill_worker, Bars(redone=10, of_stock=1)),
    Scenario("worker SIGSTOP", stop_worker, Bars(gap_s=30)),
    Scenario("raylet SIGKILL", kill_raylet, Bars(redone=10, of_stock=1 / 3)),
    Scenario("raylet SIGKILL, rank 0's", kill_leaders_raylet, Bars(redone=10, of_stock=1 / 3)),
    Scenario(f"drain, {NOTICE_S} s notice", give_notice, Bars(redone=0)),
    Scenario("SIGTERM of ray start --block", terminate_node, Bars(redone=0)),
    Scenario("node added", add_node, Bars(redone=0), nodes=2, ends_with=3),
    Scenario("all nodes lost, others come", lose_all_nodes, Bars(redone=COMMIT_STEPS)),
    Scenario("driver SIGKILL, same command", kill_driver, Bars()),
    Scenario("job stop, same command", stop_job, Bars(redone=0)),
)


# ---- playing a scenario


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
    from pipeline.sources import open_source

    folder.mkdir(parents=True, exist_ok=True)
    recipe, data, reference = folder / "recipe.yaml", folder / "data", folder / "reference"
    recipe.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    if not (data / "manifest.json").exists():
        build(
            open_source(f"synthetic:?count={SAMPLES}&classes=7"), open_store(str(data)), shard_bytes=1 << 20
        )
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
                if job.process.wait(PATIENCE_S + TOTAL_STEPS):
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
