"""The figures of a report, as SVG that takes its colours and letters from the page around it."""

import io
import re
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from trainer.laps import PARTS
from trainer.report import Curve, Floats, Found, curve, judgements, world_over_time

# What is drawn in one of these colours is drawn in the page's, which are others in light and dark.
NAMES = ("ink", "grid", "line", "mark", *PARTS)
COLOURS = {f"#0a0b{i:02x}": f"var(--{name})" for i, name in enumerate(NAMES)}
OF = dict(zip(NAMES, COLOURS, strict=True))
SIZE = (4.7, 2.6)  # inches; a phone is about as wide, and its text is then as large as 9 pt are
LOOK: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.01,
    "grid.color": OF["grid"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    **dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), OF["ink"]
    ),
}
MOST_MARKS = 200  # lines of attempts, or of events
UNITS = ((86400 * 3, 86400, "days"), (3600 * 3, 3600, "hours"), (0, 60, "minutes"))


def figures(found: Found) -> dict[str, Markup]:
    """SVG by name, of what there is to draw."""
    metrics, step = found.metrics, found.metrics["step"]
    if not len(step):
        return {}
    drawn = {}
    with rc_context(LOOK):
        drawn["loss"] = _svg(_of_steps(found, curve(step, metrics["loss"])), "loss over steps")
        figure = _of_steps(found, curve(step, metrics["lr"]))
        figure.axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        drawn["lr"] = _svg(figure, "learning rate over steps")
        figure = _of_steps(found, curve(step, metrics["img_per_s"]))
        figure.axes[0].set_ylim(bottom=0)
        figure.axes[0].yaxis.set_major_formatter(EngFormatter(sep=" "))
        drawn["img_per_s"] = _svg(figure, "images a second over steps")
        if np.isfinite(metrics["time/step"]).any():
            drawn["time"] = _svg(_shares(found), "shares of the parts of a step, over steps")
        if changes := world_over_time(found):
            drawn["world"] = _svg(_over_time(found, changes), "workers over time")
        else:
            figure = _of_steps(found, curve(step, metrics["world_size"]))
            figure.axes[0].set_ylim(bottom=0)
            drawn["world"] = _svg(figure, "workers over steps")
        judged = judgements(found)
        if any(len(those["step"]) for those in judged.values()):
            drawn["judged"] = _svg(_judged(found, judged), "top-1 over steps")
    return drawn


def _axis(xlabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(xlabel)
    return figure, axis


def _step_axis(found: Found) -> tuple[Figure, Any]:
    """With a line where each attempt began."""
    figure, axis = _axis("step")
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    for start in found.known.starts[1:][-MOST_MARKS:]:
        axis.axvline(start, color=OF["mark"], linewidth=0.7, linestyle=":", alpha=0.6, zorder=1)
    return figure, axis


def _of_steps(found: Found, drawn: Curve) -> Figure:
    """A line of means, and a band of all that they are of."""
    figure, axis = _step_axis(found)
    _draw(axis, drawn, OF["line"])
    return figure


def _draw(axis: Any, drawn: Curve, colour: str, label: str = "") -> None:
    if drawn.low is not drawn.high:
        # With an edge: a spike of one step would be too thin to be seen.
        axis.fill_between(drawn.x, drawn.low, drawn.high, color=colour, alpha=0.4, linewidth=0.8)
    axis.plot(drawn.x, drawn.mean, color=colour, label=label, marker="." if len(drawn.x) < 30 else "")


def _shares(found: Found) -> Figure:
    figure, axis = _step_axis(found)
    metrics = found.metrics
    told = np.isfinite(metrics["time/step"])
    parts = [curve(metrics["step"][told], np.nan_to_num(metrics[f"time/{part}"][told])) for part in PARTS]
    axis.stackplot(
        parts[0].x,
        [100 * part.mean for part in parts],
        labels=[part.replace("_", " ") for part in PARTS],
        colors=[OF[part] for part in PARTS],
    )
    axis.set_ylim(0, 100)
    axis.set_ylabel("% of a step")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _over_time(found: Found, changes: list[tuple[float, int]]) -> Figure:
    """How many workers there were, and a line for each event."""
    begin = changes[0][0]
    span = max(changes[-1][0] - begin, 0.0)  # clocks of two machines may differ
    changes = changes[-10 * MOST_MARKS :]
    unit, name = next((unit, name) for least, unit, name in UNITS if span >= least)
    figure, axis = _axis(f"{name} since the first attempt began")
    for event in found.events[-MOST_MARKS:]:
        bad = event["event"] == "failure"
        axis.axvline(
            (event["time"] - begin) / unit,
            color=OF["mark"],
            linewidth=0.9 if bad else 0.7,
            linestyle="-" if bad else ":",
        )
    x = [(time - begin) / unit for time, _ in changes]
    y = [size for _, size in changes]
    axis.fill_between(x, y, step="post", color=OF["line"], alpha=0.25, linewidth=0)
    axis.step(x, y, where="post", color=OF["line"])
    axis.set_ylim(0, 1.1 * max(y) or 1)
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_ylabel("workers")
    return figure


def _judged(found: Found, judged: dict[str, dict[str, Floats]]) -> Figure:
    figure, axis = _step_axis(found)
    for name, colour, label in (("val", "line", "top-1"), ("knn", "all_reduce", "nearest neighbours, top-1")):
        if len(judged[name]["step"]):
            _draw(axis, curve(judged[name]["step"], judged[name]["top1"]), OF[colour], label)
    axis.set_ylabel("%")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def _svg(figure: Figure, says: str) -> Markup:
    """For a page: without a size, names or colours of its own."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": says}):  # ids of two figures in a page are never the same
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    box = re.search(r'viewBox="[0-9. -]+"', text)
    assert box
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    for colour, variable in COLOURS.items():
        body = body.replace(colour, variable)
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(says)}">{body}')
