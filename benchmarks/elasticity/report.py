"""The report of `benchmarks.elasticity`: on the terminal and in benchmarks/results/."""

import datetime
import math
import os
import re
import shlex
import statistics
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.output import save_result
from pipeline.loading.benchmark import cpu_model

MAX_DIFFERENCE = 1e-9  # of parameters, in float64
COLUMNS = (
    "fault", "side", "world sizes", "gap, s", "steps redone", "lost, s", "steps/s before", "difference", "requirements"
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of a fault, see `benchmarks.elasticity`."""

    world_sizes: list[int]  # before, and of each group of workers after
    restarts: int
    gap_s: float
    redone: int
    lost_s: float
    steps_per_s: float  # before the fault


@dataclass(frozen=True)
class Outcome:
    """What came of one side of a scenario."""

    cost: Cost | None  # None if it failed before the fault
    apart: float | None = (
        None  # largest difference to the uninterrupted run: ours of the final parameters, stock of the losses
    )
    failure: str = ""  # why it did not recover or finish
    others: float = 0.0  # mean number of other processes that ran or waited for a core

    def __str__(self) -> str:
        if self.failure:
            return f"FAILED, {self.failure}"
        assert self.cost is not None
        sizes = "→".join(map(str, self.cost.world_sizes))
        return f"{sizes}, gap {self.cost.gap_s} s, {self.cost.redone} redone, difference {self.apart:.0e}"


@dataclass(frozen=True)
class Limits:
    """Requirements for our side; None: no requirement."""

    redone: int | None = None  # steps, at most
    gap_s: float | None = None  # seconds, at most
    of_stock: float | None = None  # gap, at most this share of stock's


def verdicts(limits: Limits, ours: Outcome, stock: Outcome | None) -> dict[str, bool]:
    """Each requirement as text, and whether it is met. If stock does not recover, its gap is infinite."""
    if ours.failure or ours.cost is None:
        return {"recovers and finishes": False}
    assert ours.apart is not None
    found = {f"parameters within {MAX_DIFFERENCE:g}": ours.apart <= MAX_DIFFERENCE}
    if limits.redone is not None:
        found[f"redone ≤ {limits.redone}"] = ours.cost.redone <= limits.redone
    if limits.gap_s is not None:
        found[f"gap ≤ {limits.gap_s:g} s"] = ours.cost.gap_s <= limits.gap_s
    if limits.of_stock is not None and stock is not None and stock.cost is not None:
        gap_s = math.inf if stock.failure else stock.cost.gap_s
        found[f"gap ≤ {limits.of_stock:.2g} × stock's"] = ours.cost.gap_s <= limits.of_stock * gap_s
    return found


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table, with COLUMNS: two rows per fault, or one without stock."""
    table = []
    for title, found in result.items():
        for side in (side for side in ("ours", "stock") if side in found):
            cost, apart, failure = (found[side][key] for key in ("cost", "apart", "failure"))
            requirements = [("" if met else "NOT MET: ") + text for text, met in found["bars"].items()]
            numbers = ["–"] * 4
            if cost:
                numbers = ["→".join(map(str, cost["world_sizes"])), f"{cost['gap_s']:.1f}",
                           str(cost["redone"]), f"{cost['lost_s']:.1f}"]  # fmt: skip
                if never := re.search(r"not in \d+ s", failure):
                    numbers[1:] = [never[0], "–", "–"]
            table.append(
                [
                    title if side == "ours" else "",
                    side,
                    *numbers,
                    f"{cost['steps_per_s']:.1f}" if cost else "–",
                    f"{apart:.0e}" if apart is not None else "–",
                    "; ".join(requirements) if side == "ours" else "",
                ]
            )
    return table


def write_report(result: dict[str, Any], explained: str | None, console: Console) -> None:
    """Print the table and write the result files.

    Args:
        explained: what the columns mean, for the Markdown file; None: write no files.
    """
    table, now = rows(result), datetime.datetime.now(datetime.UTC)
    shown = Table(*COLUMNS)
    for row in table:
        shown.add_row(*row)
    console.print(shown)
    met = [met for found in result.values() for met in found["bars"].values()]
    others = [found[side]["others"] for found in result.values() for side in found.keys() - {"bars"}]
    failed = [
        f"{title}, {side}: {found[side]['failure']}"
        for title, found in result.items()
        for side in found.keys() - {"bars"}
        if found[side]["failure"]
    ]
    lines = [
        *failed,
        f"{sum(met)} of {len(met)} requirements met.",
        f"Other processes that ran or waited for a core: {statistics.median(others):.1f} in the median of these runs, "
        f"{max(others):.1f} at most.",
    ]
    console.print("\n".join(lines))
    if explained is None:
        return

    command = shlex.join(["python", "-m", "benchmarks.elasticity", *sys.argv[1:]])
    machine = {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0))}
    text = [
        f"# Elasticity, {machine['cpu']}, {machine['cores']} cores, {now:%Y-%m-%d}",
        "",
        f"`{command}`",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "--:|" * (len(COLUMNS) - 4) + "---|",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        *lines,
        "",
        explained,
    ]
    name = f"{now:%Y-%m-%d}-elasticity"
    found = {"date": now.isoformat(timespec="minutes"), **machine, "command": command, "scenarios": result}
    console.print(save_result(name, found, "\n".join(text) + "\n"))
