"""The paper's ablation studies: pre-train several times with one setting changed, and measure each encoder.

A study is a YAML file in this folder, see `Study`. `maestream study` runs its trials as Ray tasks, and writes results.csv and
plot.png.
"""

import csv
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.errors import UserError
from pipeline.storage.store import Store
from trainer.config.device import best_device
from trainer.config.recipe import CONFIG_TYPES, fixed_values, with_overrides
from trainer.config.schema import InitConfig, PretrainConfig, RunConfig
from trainer.group.group import Group
from trainer.labels.labels import KIND_NAMES, check_val
from trainer.run.metrics import read_metrics
from trainer.run.run import LEASE, create_run, open_run
from trainer.run.worker import Callbacks, Worker
from trainer.train.registry import TRAIN_FUNCTIONS
from trainer.weights.init import resolve_start

STUDIES = Path(__file__).parent
RESULTS, PLOT, STUDY = "results.csv", "plot.png", "study.json"
MEASURES = ("finetune", "linprobe")  # tasks that measure an encoder


class Trial(BaseModel):
    """One pre-training of a study."""

    model_config = ConfigDict(extra="forbid")

    name: str
    pretrain: tuple[str, ...]  # overrides of the pre-training recipe, key=value
    paper: dict[str, float] = {}  # the paper's top-1 of ViT-L on ImageNet-1k in percent, by task of MEASURES


class Study(BaseModel):
    """A study: its trials, and how they are plotted."""

    model_config = ConfigDict(extra="forbid")

    title: str
    source: str  # table or figure of the paper
    axis: str  # label of the plot's x axis
    trials: tuple[Trial, ...]


def load_study(name: str) -> Study:
    """Read a study by name. Raise UserError if there is none of that name."""
    files = {path.stem: path for path in STUDIES.glob("*.yaml")}
    if name not in files:
        raise UserError(f"unknown study {name}; expected one of {', '.join(sorted(files))}")
    return Study.model_validate(yaml.safe_load(files[name].read_text()))


@dataclass(frozen=True)
class TrialJob:
    """A trial to be run: the input of a Ray task."""

    trial: str
    configs: dict[str, dict[str, Any]]  # by task: dumped configs
    data: str
    out: str  # folder of the study


def run_trial(job: TrialJob) -> dict[str, Any]:
    """Pre-train and measure, each in a run folder of its own. Interrupted runs are resumed. Returns the row of results."""
    dataset = open_dataset(job.data)
    row: dict[str, Any] = {"trial": job.trial}
    pretrained = f"{job.out}/{job.trial}/pretrain"
    row |= _train(PretrainConfig.model_validate(job.configs["pretrain"]), dataset, pretrained)
    for task in MEASURES:
        if task in job.configs:
            config = CONFIG_TYPES[task].model_validate(job.configs[task])
            config = config.model_copy(update={"init": InitConfig(run=pretrained)})
            row |= _train(config, dataset, f"{job.out}/{job.trial}/{task}")
    return row


def _train(config: RunConfig, dataset: Dataset, out: str) -> dict[str, float]:
    """Train to the end, starting from the newest checkpoint. Returns the last loss and top-1, for the row of results."""
    config, run = open_run(out, config, dataset)
    if run.attempt == 1:
        config = resolve_start(config, dataset)
        create_run(config, run, dataset)
    TRAIN_FUNCTIONS[config.task](config, dataset, run, Worker(Group(best_device())), Callbacks())
    last = read_metrics(run.store)[-1]
    names = {"loss": "loss", "val_top1": "top1"}
    return {f"{config.task}_{column}": last[name] for name, column in names.items() if name in last}


def make_trial_jobs(
    study: Study, recipes: dict[str, RunConfig], data: str, val: str, out: str
) -> list[TrialJob]:
    """Return a job for each trial. Raise UserError if a trial's overrides do not fit the recipe.

    Args:
        recipes: config by task; pretrain, and at least one of MEASURES.
        data: folder of the training dataset.
        val: folder of the validation dataset.
        out: folder of the study.
    """
    jobs = []
    for trial in study.trials:
        configs: dict[str, dict[str, Any]] = {}
        for task, config in recipes.items():
            if task == "pretrain":
                changed = with_overrides(config, trial.pretrain, f"trial {trial.name}")
            else:
                changed = config.model_copy(update={"data": config.data.model_copy(update={"val": val})})
            configs[task] = changed.model_dump()
        jobs.append(TrialJob(trial.name, configs, data, out))
    return jobs


def prepare_study(
    name: str, recipes: dict[str, RunConfig], dataset: Dataset, val: Dataset, store: Store
) -> None:
    """Record the study's recipes and datasets in its folder, or compare with the record.

    Raises UserError if recipes or datasets do not fit each other, or if the folder has another study.
    """
    if not any(task in recipes for task in MEASURES):
        raise UserError("a study needs --linprobe or --finetune: a recipe that measures the encoders")
    if (kind := dataset.manifest.labels) != "class":
        raise UserError(
            f"a study compares top-1 accuracies with the paper's, but the labels of {dataset.store.url} are "
            f"{KIND_NAMES[kind]}: use `maestream finetune` or `maestream linprobe`"
        )
    check_val(dataset, val)
    encoders = {task: config.model.encoder for task, config in recipes.items()}
    for task, encoder in encoders.items():
        if encoder != encoders["pretrain"]:
            raise UserError(
                f"the recipes of --{task} and --pretrain have different encoders: {encoder} and {encoders['pretrain']}"
            )
    record = {"study": name, "data": dataset.fingerprint, "val": val.fingerprint}
    record |= {
        f"{task}.{key}": value
        for task, config in recipes.items()
        for key, value in fixed_values(config).items()
    }
    record = json.loads(json.dumps(record))
    try:
        old = json.loads(store.read(STUDY))
    except FileNotFoundError:
        if names := [name for name in store.names() if name != LEASE]:
            raise UserError(f"{store.url} is not empty (it has {names[0]}): choose another --out") from None
        store.write(STUDY, (json.dumps(record, indent=1) + "\n").encode())
        return
    changed = [key for key in {**old, **record} if old.get(key) != record.get(key)]
    if changed:
        changes = "; ".join(f"{key} {old.get(key)} → {record.get(key)}" for key in changed[:3])
        raise UserError(f"{store.url} has another study ({changes}): choose another --out")


def read_results(store: Store) -> list[dict[str, str]]:
    """Read the rows of the trials that have ended."""
    try:
        return list(csv.DictReader(io.StringIO(store.read(RESULTS).decode())))
    except FileNotFoundError:
        return []


def write_results(store: Store, study: Study, rows: list[dict[str, Any]]) -> None:
    """Write results.csv and plot.png, with the rows in the order of the study's trials."""
    order = [trial.name for trial in study.trials]
    rows = sorted(rows, key=lambda row: order.index(row["trial"]))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    store.write(RESULTS, text.getvalue().encode())
    store.write(PLOT, draw_plot(study, rows))


def draw_plot(study: Study, rows: list[dict[str, Any]]) -> bytes:
    """Draw a PNG: top-1 of each measure over the trials, and on a second axis the paper's (ViT-L, ImageNet-1k)."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(f"{study.title} ({study.source})")
    names = [trial.name for trial in study.trials]
    numeric = all(re.fullmatch(r"[0-9.]+", name) for name in names)
    positions = dict(zip(names, map(float, names) if numeric else range(len(names)), strict=True))
    measures = [task for task in MEASURES if any(row.get(f"{task}_top1") for row in rows)]
    panels = figure.subplots(1, max(len(measures), 1), squeeze=False)[0]
    for panel, task in zip(panels, measures, strict=False):
        paper_panel = panel.twinx()
        panel.set_zorder(paper_panel.get_zorder() + 1)  # draw our results above the paper's
        panel.patch.set_visible(False)
        line = "-" if numeric else ""  # no line between names
        paper = {trial.name: trial.paper[task] for trial in study.trials if task in trial.paper}
        ours = {row["trial"]: float(row[f"{task}_top1"]) for row in rows if row.get(f"{task}_top1")}
        label = "paper, ViT-L, ImageNet (right axis)"
        paper_lines = _draw_line(paper_panel, positions, paper, f"s{line}", color="lightgrey", label=label)
        our_lines = _draw_line(panel, positions, ours, f"o{line}", label="this study")
        _set_equal_spans([(panel, ours), (paper_panel, paper)])
        paper_panel.set_ylabel("paper, top-1 %", color="grey")
        panel.set_xticks(list(positions.values()), names, rotation=0 if len(names) < 8 else 45)
        panel.set_xlabel(study.axis)
        panel.margins(x=0.05 if numeric else 0.3)
        panel.set_ylabel("top-1 %")
        panel.set_title({"finetune": "fine-tuned", "linprobe": "linear probe"}[task])
    if measures:
        figure.legend(
            handles=[*our_lines, *paper_lines], loc="outside lower center", ncols=2, fontsize="small"
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_line(
    panel: Any, positions: dict[str, float], values: dict[str, float], style: str, **options: Any
) -> list[Any]:
    if not values:
        return []
    heights = [values.get(name, math.nan) for name in positions]
    return panel.plot(list(positions.values()), heights, style, **options)


def _set_equal_spans(panels: list[tuple[Any, dict[str, float]]]) -> None:
    """Give all y axes the same span in percentage points, so that slopes can be compared."""
    ranges = [(panel, min(values.values()), max(values.values())) for panel, values in panels if values]
    span = max([2.0, *(1.3 * (high - low) for _, low, high in ranges)])
    for panel, low, high in ranges:
        panel.set_ylim((low + high - span) / 2, (low + high + span) / 2)
