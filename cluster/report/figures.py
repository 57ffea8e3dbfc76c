"""The figures of a report: SVG that takes colours and fonts from the page that contains it."""

import io
import re
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from pipeline.arrays import Floats
from trainer.labels.measures import MEASURES
from trainer.run.step_timer import PARTS
from trainer.run.summary import (
    Curve,
    RunSummary,
    curve,
    evaluation_curves,
    main_measure,
    world_over_time,
)

# Figures are drawn in placeholder colours. In the SVG each becomes a CSS variable of the page, which differs in light and
# dark mode.
COLOUR_NAMES = ("ink", "grid", "line", "mark", *PARTS)
CSS_VARIABLES = {f"#0a0b{i:02x}": f"var(--{name})" for i, name in enumerate(COLOUR_NAMES)}
COLOURS = dict(zip(COLOUR_NAMES, CSS_VARIABLES, strict=True))
SIZE = (4.7, 2.6)  # inches: about the width of a phone, where the text appears at its true 9 pt
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.01,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    **dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), COLOURS["ink"]
    ),
}
MAX_MARKS = 200  # vertical lines for attempts or events; the newest are drawn
# Units of time axes: from which span (seconds) they are used, their length in seconds, and their name.
TIME_UNITS = ((86400 * 3, 86400, "days"), (3600 * 3, 3600, "hours"), (0, 60, "minutes"))


def draw_figures(summary: RunSummary) -> dict[str, Markup]:
    """Return the figures as SVG by name: loss, lr, img_per_s, time, world and scores, without those that have no data."""
    metrics, step = summary.metrics, summary.metrics["step"]
    if not len(step):
        return {}
    drawn = {}
    with rc_context(STYLE):
        drawn["loss"] = _svg(_draw_over_steps(summary, curve(step, metrics["loss"])), "loss over steps")
        figure = _draw_over_steps(summary, curve(step, metrics["lr"]))
        figure.axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        drawn["lr"] = _svg(figure, "learning rate over steps")
        figure = _draw_over_steps(summary, curve(step, metrics["img_per_s"]))
        figure.axes[0].set_ylim(bottom=0)
        figure.axes[0].yaxis.set_major_formatter(EngFormatter(sep=" "))
        drawn["img_per_s"] = _svg(figure, "images per second over steps")
        if np.isfinite(metrics["time/step"]).any():
            drawn["time"] = _svg(_draw_time_shares(summary), "share of each part of a step over steps")
        if changes := world_over_time(summary):
            drawn["world"] = _svg(_draw_workers(summary, changes), "workers over time")
        else:
            figure = _draw_over_steps(summary, curve(step, metrics["world_size"]))
            figure.axes[0].set_ylim(bottom=0)
            drawn["world"] = _svg(figure, "workers over steps")
        scores = evaluation_curves(summary)
        if any(len(columns["step"]) for columns in scores.values()):
            drawn["scores"] = _svg(_draw_scores(summary, scores), "results of evaluations over steps")
    return drawn


def _new_figure(xlabel: str) -> tuple[Figure, Any]:
    """Return an empty figure and its axes."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(xlabel)
    return figure, axis


def _new_figure_over_steps(summary: RunSummary) -> tuple[Figure, Any]:
    """Return a figure whose x-axis is the step, with a line where each attempt but the first started."""
    figure, axis = _new_figure("step")
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    for start in summary.record.starts[1:][-MAX_MARKS:]:
        axis.axvline(start, color=COLOURS["mark"], linewidth=0.7, linestyle=":", alpha=0.6, zorder=1)
    return figure, axis


def _draw_over_steps(summary: RunSummary, values: Curve) -> Figure:
    figure, axis = _new_figure_over_steps(summary)
    _draw_curve(axis, values, COLOURS["line"])
    return figure


def _draw_curve(axis: Any, values: Curve, colour: str, label: str = "") -> None:
    """Draw the mean as a line, and the range from minimum to maximum as a band."""
    if values.low is not values.high:
        # The band has an edge: without it, a spike of a single step would be too thin to be visible.
        axis.fill_between(values.x, values.low, values.high, color=colour, alpha=0.4, linewidth=0.8)
    axis.plot(values.x, values.mean, color=colour, label=label, marker="." if len(values.x) < 30 else "")


def _draw_time_shares(summary: RunSummary) -> Figure:
    """Draw the share of each part of a step, stacked."""
    figure, axis = _new_figure_over_steps(summary)
    metrics = summary.metrics
    measured = np.isfinite(metrics["time/step"])
    steps = metrics["step"][measured]
    parts = [curve(steps, np.nan_to_num(metrics[f"time/{part}"][measured])) for part in PARTS]
    axis.stackplot(
        parts[0].x,
        [100 * part.mean for part in parts],
        labels=[part.replace("_", " ") for part in PARTS],
        colors=[COLOURS[part] for part in PARTS],
    )
    axis.set_ylim(0, 100)
    axis.set_ylabel("% of the step time")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _draw_workers(summary: RunSummary, changes: list[tuple[float, int]]) -> Figure:
    """Draw the number of workers over time, with a vertical line for each event."""
    begin = changes[0][0]
    span = max(changes[-1][0] - begin, 0.0)  # the clocks of two machines may differ
    changes = changes[-10 * MAX_MARKS :]
    unit, unit_name = next((unit, name) for least, unit, name in TIME_UNITS if span >= least)
    figure, axis = _new_figure(f"{unit_name} since the start of the first attempt")
    for event in summary.events[-MAX_MARKS:]:
        failure = event["event"] == "failure"
        axis.axvline(
            (event["time"] - begin) / unit,
            color=COLOURS["mark"],
            linewidth=0.9 if failure else 0.7,
            linestyle="-" if failure else ":",
        )
    x = [(time - begin) / unit for time, _ in changes]
    y = [world_size for _, world_size in changes]
    axis.fill_between(x, y, step="post", color=COLOURS["line"], alpha=0.25, linewidth=0)
    axis.step(x, y, where="post", color=COLOURS["line"])
    axis.set_ylim(0, 1.1 * max(y) or 1)
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_ylabel("workers")
    return figure


def _draw_scores(summary: RunSummary, scores: dict[str, dict[str, Floats]]) -> Figure:
    """Draw the evaluation metric over the steps: top-1 accuracy, mAP or R²."""
    figure, axis = _new_figure_over_steps(summary)
    for prefix, colour, source in (("val", "line", ""), ("knn", "all_reduce", "k-NN ")):
        columns = scores[prefix]
        if name := main_measure(columns):
            measure = MEASURES[name]
            _draw_curve(axis, curve(columns["step"], columns[name]), COLOURS[colour], source + measure.label)
            axis.set_ylabel(measure.unit.strip() or measure.label)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def _svg(figure: Figure, label: str) -> Markup:
    """Return a figure as an SVG element without size, ids of groups or fixed colours.

    Args:
        figure: the figure, drawn in COLOURS.
        label: describes the figure to screen readers; unique within a page.
    """
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": label}):  # so that ids are unique within a page
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    box = re.search(r'viewBox="[0-9. -]+"', text)
    assert box
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    for colour, variable in CSS_VARIABLES.items():
        body = body.replace(colour, variable)
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(label)}">{body}')
