"""The report of `maestream report`: one HTML page that describes a run, running or finished."""

import datetime
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.secrets import without_secrets
from pipeline.text import plural

if TYPE_CHECKING:
    from trainer.run.summary import RunSummary

TEMPLATE = Path(__file__).with_name("report.html")
MAX_ROWS = 200  # of a table; the newest are shown
PART_NAMES = {  # labels of the parts of the training time, see trainer.run.summary.time_spent
    "data_wait": "waiting for data",
    "host_to_device": "copies to the device",
    "step": "computation: forward, backward, optimizer",
    "all_reduce": "all-reduce that does not overlap with the backward pass",
    "checkpoint": "checkpoints and snapshots",
    "other": "other",
    "unmeasured": "not measured",
    "restarts": "changes of workers: no training between attempts",
}


def render_page(summary: "RunSummary") -> str:
    """Return the report as HTML. All text from the run folder is escaped, and secrets in it are masked."""
    import jinja2

    from cluster.report.figures import draw_figures
    from trainer.labels.measures import MEASURES, found_measures
    from trainer.run.step_timer import PARTS
    from trainer.run.summary import evaluation_curves, main_measure, time_spent

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: without_secrets(value) if type(value) is str else value,
    )
    environment.filters |= {"duration": duration, "moment": moment, "number": number, "measure": measure}
    curves = evaluation_curves(summary)
    scores = {name: _rows(columns) for name, columns in curves.items()}
    main = main_measure(curves["val"]) or main_measure(curves["knn"])
    evaluated = {name for result in summary.evaluations for name in result}
    spent = {part: seconds for part, seconds in time_spent(summary).items() if seconds > 0 or part in PARTS}
    return environment.from_string(TEMPLATE.read_text()).render(
        run=summary,
        created=datetime.datetime.now(datetime.UTC).timestamp(),
        state=run_state(summary),
        tiles=_tiles(summary, spent),
        figures=draw_figures(summary),
        spent=spent if sum(spent.values()) else {},
        parts=PART_NAMES,
        events=[event | {"text": event_text(event)} for event in summary.events[-MAX_ROWS:]],
        bad_samples=summary.bad_samples[:MAX_ROWS],
        scores={name: rows[-MAX_ROWS:] for name, rows in scores.items()},
        all_scores=scores,
        evaluations=summary.evaluations[-MAX_ROWS:],
        measures=MEASURES,
        scores_title=f"{MEASURES[main].title} during training" if main else "",
        measured={name: [one for one in columns if one in MEASURES] for name, columns in curves.items()},
        evaluated=found_measures(evaluated, "val"),
        versions=_versions(summary),
    )


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def moment(seconds: float) -> str:
    """Return a time, in seconds since 1970, as a UTC date and time."""
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S}"


def number(value: object, digits: int = 0) -> str:
    """Return a number with thousands separators, or a dash for None, NaN and anything else."""
    valid = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:,.{digits}f}" if valid else "–"


def measure(value: object, name: str) -> str:
    """Return the value of one of `trainer.labels.measures.MEASURES` without its unit, or a dash as `number`."""
    from trainer.labels.measures import MEASURES

    valid = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:{MEASURES[name].format}}" if valid else "–"


def event_text(event: dict[str, Any]) -> str:
    """Return an event as one line; as JSON if it is of a kind that this version does not know."""
    from cluster.terminal.messages import event_line

    try:
        return event_line(event)
    except (KeyError, TypeError, ValueError):
        return json.dumps(event)


def run_state(summary: "RunSummary") -> tuple[str, str]:
    """Return the state of a run as one word and as an explanation."""
    if summary.failure:
        return "stopped", summary.failure
    if owner := summary.owner:
        return (
            "running",
            f"owned by process {owner.get('pid')} on {owner.get('host')}, if that is still alive",
        )
    committed = summary.committed[-1] if summary.committed else 0
    if summary.steps and summary.steps == summary.total_steps == committed:
        return "done", "all steps are trained and saved in a checkpoint"
    last = f"the last checkpoint is of step {committed:,}" if committed else "there is no checkpoint"
    return "not running", last + (": run the same command again to resume" if summary.total_steps else "")


def _tiles(summary: "RunSummary", spent: dict[str, float]) -> list[tuple[str, str, str]]:
    """Return the key numbers at the top of the page: title, value and detail of each."""
    metrics, steps, total = summary.metrics, summary.steps, summary.total_steps
    if not steps:
        return []
    last = {name: float(column[-1]) for name, column in metrics.items()}
    rates = sorted(metrics["img_per_s"])
    checkpoint = ("none", "yet")
    if summary.committed:
        checkpoint = (
            f"step {summary.committed[-1]:,}",
            f"{plural(len(summary.committed), 'checkpoint')} kept",
        )
    epochs = summary.config.epochs
    progress = f"in the first of {epochs:g} epochs"
    if total:
        progress = f"{steps / total:.0%} of {total:,}: {epochs * steps / total:.1f} of {epochs:g} epochs"
    batch = summary.config.global_batch
    return [
        ("steps", f"{steps:,}", progress),
        ("images", f"{steps * batch:,}", f"{batch:,} per step"),
        ("loss", f"{last['loss']:.4f}", f"{metrics['loss'][0]:.4f} at the first step"),
        ("images per second", f"{last['img_per_s']:,.0f}", f"median {rates[len(rates) // 2]:,.0f}"),
        ("waiting for data", f"{spent['data_wait'] / (sum(spent.values()) or 1):.1%}", "of the total time"),
        ("workers", f"{last['world_size']:.0f}", plural(len(summary.record.starts), "attempt")),
        ("last checkpoint", *checkpoint),
        ("bad samples", f"{len(summary.bad_samples):,}", "distinct"),
    ]


def _rows(columns: dict[str, Any]) -> list[dict[str, float]]:
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def _versions(summary: "RunSummary") -> list[tuple[str, str]]:
    """Return the ranges of attempts that used the same package versions, with these versions."""
    firsts = sorted(summary.record.versions)
    lasts = [*(first - 1 for first in firsts[1:]), len(summary.record.starts)]
    return [
        (
            f"attempt {first}" if first == last else f"attempts {first} to {last}",
            ", ".join(f"{name} {number}" for name, number in summary.record.versions[first].items()),
        )
        for first, last in zip(firsts, lasts, strict=False)
    ]
