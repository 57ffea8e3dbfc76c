"""The table of `benchmarks.elasticity`, on the terminal and in benchmarks/results/."""

import datetime
import json
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

from benchmarks.report import RESULTS
from pipeline.bench import cpu_model

APART = 1e-9  # float64
COLUMNS = ("fault", "side", "world sizes", "gap s", "redone", "lost s", "steps/s before", "apart", "bars")


@dataclass(frozen=True)
class Cost:
    """What a fault has cost, see `benchmarks.elasticity`."""

    world_sizes: list[int]  # before, and of each group of workers after
    restarts: int
    gap_s: float
    redone: int
    lost_s: float
    steps_per_s: float  # before the fault


@dataclass(frozen=True)
class Outcome:
    cost: Cost | None  # None if it did not come as far as the fault
    apart: float | None = None  # ours: largest difference of the final parameters; stock: of the losses
    failure: str = ""  # why it did not recover, or not finish
    others: float = 0.0  # processes besides the benchmark's that wanted a core, on average

    def __str__(self) -> str:
        if self.failure:
            return f"FAILED, {self.failure}"
        assert self.cost is not None
        sizes = "→".join(map(str, self.cost.world_sizes))
        return f"{sizes}, gap {self.cost.gap_s} s, {self.cost.redone} redone, apart {self.apart:.0e}"


@dataclass(frozen=True)
class Bars:
    """What ours has to keep; None: no bar."""

    redone: int | None = None  # at most so many steps
    gap_s: float | None = None  # at most
    of_stock: float | None = None  # gap, at most this part of stock's


def verdicts(bars: Bars, ours: Outcome, stock: Outcome | None) -> dict[str, bool]:
    """Each bar in words, and whether it is kept. A stock that does not recover is slower than any gap."""
    if ours.failure or ours.cost is None:
        return {"recovers and finishes": False}
    assert ours.apart is not None
    found = {f"parameters within {APART:g}": ours.apart <= APART}
    if bars.redone is not None:
        found[f"redone ≤ {bars.redone}"] = ours.cost.redone <= bars.redone
    if bars.gap_s is not None:
        found[f"gap ≤ {bars.gap_s:g} s"] = ours.cost.gap_s <= bars.gap_s
    if bars.of_stock is not None and stock is not None and stock.cost is not None:
        gap_s = math.inf if stock.failure else stock.cost.gap_s
        found[f"gap ≤ {bars.of_stock:.2g} × stock's"] = ours.cost.gap_s <= bars.of_stock * gap_s
    return found


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Of COLUMNS: two for each fault, or one without stock."""
    table = []
    for title, found in result.items():
        for side in (side for side in ("ours", "stock") if side in found):
            cost, apart, failure = (found[side][key] for key in ("cost", "apart", "failure"))
            bars = [("" if kept else "NOT ") + bar for bar, kept in found["bars"].items()]
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
                    "; ".join(bars) if side == "ours" else "",
                ]
            )
    return table


def write_report(result: dict[str, Any], explained: str | None, console: Console) -> None:
    """Args: explained: what the columns mean; None: print the table, and write no file."""
    table, now = rows(result), datetime.datetime.now(datetime.UTC)
    shown = Table(*COLUMNS)
    for row in table:
        shown.add_row(*row)
    console.print(shown)
    kept = [kept for found in result.values() for kept in found["bars"].values()]
    others = [found[side]["others"] for found in result.values() for side in found.keys() - {"bars"}]
    failed = [
        f"{title}, {side}: {found[side]['failure']}"
        for title, found in result.items()
        for side in found.keys() - {"bars"}
        if found[side]["failure"]
    ]
    lines = [
        *failed,
        f"{sum(kept)} of {len(kept)} bars kept.",
        f"Besides the benchmark's own, {statistics.median(others):.1f} processes wanted a core in the median of these "
        f"runs, {max(others):.1f} at most.",
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
    RESULTS.mkdir(exist_ok=True)
    found = {"date": now.isoformat(timespec="minutes"), **machine, "command": command, "scenarios": result}
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / f"{name}.md").write_text("\n".join(text) + "\n")
    console.print(f"written: {RESULTS / name}.md and .json")
