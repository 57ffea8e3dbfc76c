"""The paper's studies: the same training many times over, with one thing changed, and what each encoder is then worth."""

import csv
import io
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from pipeline.errors import UserError
from pipeline.manifest import Dataset, open_dataset
from pipeline.storage import Store
from trainer.config import InitConfig, PretrainConfig, RunConfig
from trainer.device import best_device
from trainer.evaluate import check_classes
from trainer.initial import fix_init
from trainer.metrics import read_metrics
from trainer.recipe import KINDS, fixed_part, with_overrides
from trainer.run import LEASE, found_run, open_run
from trainer.tasks import LOOPS

STUDIES = Path(__file__).parent / "studies"
RESULTS, PLOT, STUDY = "results.csv", "plot.png", "study.json"
MEASURED = ("finetune", "linprobe")


class Trial(BaseModel):
    """One training of a study."""

    model_config = ConfigDict(extra="forbid")

    name: str
    pretrain: tuple[str, ...]  # key=value
    paper: dict[str, float] = {}  # top-1 of ViT-L on ImageNet, in percent, by what measured it


class Study(BaseModel):
    """What is changed, from trial to trial."""

    model_config = ConfigDict(extra="forbid")

    title: str
    source: str  # where the paper has it
    axis: str  # of the plot
    trials: tuple[Trial, ...]


def load_study(name: str) -> Study:
    """One of recipes/studies. UserError if it is not there."""
    known = {path.stem: path for path in STUDIES.glob("*.yaml")}
    if name not in known:
        raise UserError(f"there is no study {name}: known are {', '.join(sorted(known))}")
    return Study.model_validate(yaml.safe_load(known[name].read_text()))


@dataclass(frozen=True)
class Job:
    """A trial to be done: what a task is given."""

    trial: str
    configs: dict[str, dict[str, Any]]  # by task: configs as trees; that of pre-training is the first
    data: str
    out: str


def run_trial(job: Job) -> dict[str, Any]:
    """Pre-train, then measure. Goes on where it was. Returns the trial's row of results."""
    dataset = open_dataset(job.data)
    row: dict[str, Any] = {"trial": job.trial}
    begun = f"{job.out}/{job.trial}/pretrain"
    _done(PretrainConfig.model_validate(job.configs["pretrain"]), dataset, begun, row)
    for kind in MEASURED:
        if kind in job.configs:
            config = KINDS[kind].model_validate(job.configs[kind])
            config = config.model_copy(update={"init": InitConfig(run=begun)})
            _done(config, dataset, f"{job.out}/{job.trial}/{kind}", row)
    return row


def _done(config: RunConfig, dataset: Dataset, out: str, row: dict[str, Any]) -> None:
    config, run = open_run(out, config, dataset)
    if run.attempt == 1:
        config = fix_init(config)
        found_run(config, run, dataset)
    LOOPS[config.task](config, dataset, replace(run, device=best_device()))
    last = read_metrics(run.store)[-1]
    row[f"{config.task}_loss"] = last["loss"]
    if "val_top1" in last:
        row[f"{config.task}_top1"] = last["val_top1"]


def jobs_of(study: Study, recipes: dict[str, RunConfig], data: str, val: str, out: str) -> list[Job]:
    """Every trial of a study. UserError where one's changes do not fit the recipes."""
    jobs = []
    for trial in study.trials:
        configs: dict[str, dict[str, Any]] = {}
        for kind, config in recipes.items():
            if kind == "pretrain":
                changed = with_overrides(config, trial.pretrain, f"trial {trial.name}")
            else:
                changed = config.model_copy(update={"data": config.data.model_copy(update={"val": val})})
            configs[kind] = changed.model_dump()
        jobs.append(Job(trial.name, configs, data, out))
    return jobs


def begin_study(
    name: str, recipes: dict[str, RunConfig], dataset: Dataset, val: Dataset, store: Store
) -> None:
    """Write down what a study is, where that is not done yet. UserError where the recipes or datasets do not fit each
    other, or the folder has another study."""
    if not any(kind in recipes for kind in MEASURED):
        raise UserError("a study needs --linprobe or --finetune: a recipe by which encoders are measured")
    check_classes(dataset, val)
    shapes = {kind: config.model.encoder for kind, config in recipes.items()}
    for kind, shape in shapes.items():
        if shape != shapes["pretrain"]:
            raise UserError(
                f"the recipe of --{kind} has another encoder than that of --pretrain: {shape}, not {shapes['pretrain']}"
            )
    ours = {"study": name, "data": dataset.fingerprint, "val": val.fingerprint}
    ours |= {
        f"{kind}.{key}": value
        for kind, config in recipes.items()
        for key, value in fixed_part(config).items()
    }
    ours = json.loads(json.dumps(ours))
    try:
        there = json.loads(store.read(STUDY))
    except FileNotFoundError:
        if names := [name for name in store.names() if name != LEASE]:
            raise UserError(f"{store.url} is not empty ({names[0]}, …): choose another --out") from None
        store.write(STUDY, (json.dumps(ours, indent=1) + "\n").encode())
        return
    changed = [key for key in {**there, **ours} if there.get(key) != ours.get(key)]
    if changed:
        said = "; ".join(f"{key} {there.get(key)} → {ours.get(key)}" for key in changed[:3])
        raise UserError(f"{store.url} has another study ({said}): choose another --out")


def read_results(store: Store) -> list[dict[str, str]]:
    """Rows of trials that are done."""
    try:
        return list(csv.DictReader(io.StringIO(store.read(RESULTS).decode())))
    except FileNotFoundError:
        return []


def write_results(store: Store, study: Study, rows: list[dict[str, Any]]) -> None:
    """The table and the plot of the rows that are there, in the study's order."""
    order = [trial.name for trial in study.trials]
    rows = sorted(rows, key=lambda row: order.index(row["trial"]))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    store.write(RESULTS, text.getvalue().encode())
    store.write(PLOT, draw(study, rows))


def draw(study: Study, rows: list[dict[str, Any]]) -> bytes:
    """PNG: each measure over the trials, and the paper's ViT-L on ImageNet by an axis of its own, where it has numbers."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(f"{study.title} ({study.source})")
    names = [trial.name for trial in study.trials]
    numbers = all(re.fullmatch(r"[0-9.]+", name) for name in names)
    places = dict(zip(names, map(float, names) if numbers else range(len(names)), strict=True))
    kinds = [kind for kind in MEASURED if any(row.get(f"{kind}_top1") for row in rows)]
    panels = figure.subplots(1, max(len(kinds), 1), squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=False):
        other = panel.twinx()
        panel.set_zorder(other.get_zorder() + 1)  # ours on top
        panel.patch.set_visible(False)
        style = "-" if numbers else ""  # between names there is nothing
        paper = {trial.name: trial.paper[kind] for trial in study.trials if kind in trial.paper}
        done = {row["trial"]: float(row[f"{kind}_top1"]) for row in rows if row.get(f"{kind}_top1")}
        theirs = _line(
            other, places, paper, f"s{style}", color="lightgrey", label="paper, ViT-L, ImageNet (right axis)"
        )
        ours = _line(panel, places, done, f"o{style}", label="here")
        _same_span([(panel, done), (other, paper)])
        other.set_ylabel("paper, top-1 %", color="grey")
        panel.set_xticks(list(places.values()), names, rotation=0 if len(names) < 8 else 45)
        panel.set_xlabel(study.axis)
        panel.margins(x=0.05 if numbers else 0.3)
        panel.set_ylabel("top-1 %")
        panel.set_title({"finetune": "fine-tuned", "linprobe": "linear probe"}[kind])
    if kinds:
        figure.legend(handles=[*ours, *theirs], loc="outside lower center", ncols=2, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _line(
    panel: Any, places: dict[str, float], values: dict[str, float], style: str, **look: Any
) -> list[Any]:
    if not values:
        return []
    return panel.plot(list(places.values()), [values.get(name, math.nan) for name in places], style, **look)


def _same_span(panels: list[tuple[Any, dict[str, float]]]) -> None:
    """As many points from bottom to top on all of them, so that slopes can be compared."""
    shown = [(panel, min(values.values()), max(values.values())) for panel, values in panels if values]
    span = max([2.0, *(1.3 * (high - low) for _, low, high in shown)])
    for panel, low, high in shown:
        panel.set_ylim((low + high - span) / 2, (low + high + span) / 2)
