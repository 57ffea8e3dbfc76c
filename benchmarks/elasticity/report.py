"""The report of `benchmarks.elasticity`: on the terminal and in benchmarks/results/."""

import datetime
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
JOIN_S = 0.5  # longest pause for a worker that comes back
COLUMNS = (
    "fault",
    "side",
    "workers",
    "pause, s",
    "repeated",
    "kept",
    "step, s",
    "difference",
    "requirements",
)


@dataclass(frozen=True)
class Cost:
    """The cost of a fault, see `benchmarks.elasticity`."""

    workers: list[int]  # before the fault, and after each change
    pauses_s: list[float]  # of each change
    repeated: int  # steps
    step_s: float  # seconds of a step before the fault, the median


@dataclass(frozen=True)
class Outcome:
    """What came of one side of a scenario."""

    cost: Cost | None  # None if it failed before the fault
    kept: int  # workers whose process is the same after the fault
    # Largest difference to the uninterrupted run: in place of the final parameters, others of the losses.
    apart: float | None = None
    exact: bool | None = None  # whether each step had its samples; in place only
    failure: str = ""  # why it did not recover or finish
    others: float = 0.0  # mean number of other processes that ran or waited for a core

    def __str__(self) -> str:
        if self.failure:
            return f"FAILED, {self.failure}"
        assert self.cost is not None
        sizes, pauses = "→".join(map(str, self.cost.workers)), " + ".join(map(str, self.cost.pauses_s))
        return f"{sizes}, pause {pauses} s, {self.cost.repeated} repeated, {self.kept} kept, difference {self.apart:.0e}"


@dataclass(frozen=True)
class Limits:
    """Requirements for changes in place; None: no requirement."""

    pause_s: float | None = None  # seconds, at most
    repeated: int | None = None  # steps, at most
    survivors: int | None = None  # workers whose process is the same


def verdicts(limits: Limits, found: Outcome) -> dict[str, bool]:
    """Each requirement as text, and whether it is met."""
    if found.failure or found.cost is None:
        return {"recovers and finishes": False}
    assert found.apart is not None
    first, *others = found.cost.pauses_s
    judged = {
        f"parameters within {MAX_DIFFERENCE:g}": found.apart <= MAX_DIFFERENCE,
        "ledger exact": bool(found.exact),
    }
    if limits.pause_s is not None:
        judged[f"pause ≤ {limits.pause_s:g} s"] = first <= limits.pause_s
        if others:
            judged[f"return ≤ {JOIN_S:g} s"] = max(others) <= JOIN_S
    if limits.repeated is not None:
        judged[f"repeated ≤ {limits.repeated}"] = found.cost.repeated <= limits.repeated
    if limits.survivors is not None:
        judged[f"{limits.survivors} kept"] = found.kept == limits.survivors
    return judged


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table, with COLUMNS: a row for each fault and side."""
    table = []
    for title, found in result.items():
        for nth, side in enumerate(key for key in found if key != "requirements"):
            cost, apart, failure = (found[side][key] for key in ("cost", "apart", "failure"))
            requirements = [
                ("" if met else "NOT MET: ") + text for text, met in found["requirements"].items()
            ]
            numbers = ["–"] * 5
            if cost:
                pauses = " + ".join(f"{pause:.3f}" for pause in cost["pauses_s"])
                numbers = ["→".join(map(str, cost["workers"])), pauses, str(cost["repeated"]),
                           str(found[side]["kept"]), f"{cost['step_s']:.3f}"]  # fmt: skip
                if never := re.search(r"not in \d+ s", failure):
                    numbers[1:4] = [never[0], "–", "–"]
            table.append(
                [
                    "" if nth else title,
                    side,
                    *numbers,
                    f"{apart:.0e}" if apart is not None else "–",
                    "; ".join(requirements) if side == "in place" else "",
                ]
            )
    return table


def write_report(name: str, result: dict[str, Any], explained: str | None, console: Console) -> None:
    """Print the table and write the result files, <date>-<name>.

    Args:
        explained: what the columns mean, for the Markdown file; None: write no files.
    """
    table, now = rows(result), datetime.datetime.now(datetime.UTC)
    shown = Table(*COLUMNS)
    for row in table:
        shown.add_row(*row)
    console.print(shown)
    met = [met for found in result.values() for met in found["requirements"].values()]
    others = [found[side]["others"] for found in result.values() for side in found.keys() - {"requirements"}]
    failed = [
        f"{title}, {side}: {found[side]['failure']}"
        for title, found in result.items()
        for side in found.keys() - {"requirements"}
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
    name = f"{now:%Y-%m-%d}-{name}"
    found = {"date": now.isoformat(timespec="minutes"), **machine, "command": command, "scenarios": result}
    console.print(save_result(name, found, "\n".join(text) + "\n"))
