"""The table of `benchmarks.peers`, on the terminal and in benchmarks/results/."""

import datetime
import json
import platform
import re
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path("benchmarks/results")
OURS = "maestream"
COLUMNS = ("contestant", "workers", "img/s", "min–max", "maestream is", "min–max", "crops apart")


def cpu_model() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else platform.processor() or "unknown CPU"


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Of COLUMNS, the fastest first."""
    rounds = [measured["rates"] for measured in result["rounds"]]
    table = []
    for title in sorted(rounds[0], key=lambda title: -statistics.median(r[title] for r in rounds)):
        rates = [r[title] for r in rounds]
        ratios = [r[OURS] / r[title] for r in rounds]  # of the same round
        apart = result["crops_apart"][title]
        table.append(
            [
                title,
                str(result["workers"][title]),
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f}–{max(rates):,.0f}",
                f"{statistics.median(ratios):.2f} ×",
                f"{min(ratios):.2f}–{max(ratios):.2f}",
                "its own" if apart is None else f"{apart:.2f}",
            ]
        )
    return table


def way_from_the_floor(result: dict[str, Any]) -> list[str]:
    """Where the time of an image goes, in µs of one core: each step adds what the one before has not."""
    cores = result["cores"]
    titles = ["our decoder alone, 1 thread", f"our decoder alone, {cores} threads", OURS]
    rate = {t: statistics.median(r["rates"][t] for r in result["rounds"]) for t in titles}
    one, all_cores, ours = titles
    floor = rate[one] * cores
    cost = {one: 1e6 / rate[one], all_cores: cores * 1e6 / rate[all_cores], ours: cores * 1e6 / rate[ours]}
    return [
        f"The floor: one core decodes and resizes {rate[one]:,.0f} img/s with nothing else to do, {cores} would "
        f"{floor:,.0f}; maestream is at {rate[ours] / floor:.0%} of it.",
        f"An image costs {cost[one]:,.0f} µs of a core in the decoder, {cost[all_cores] - cost[one]:+,.0f} µs "
        f"because {cores} threads share memory and Python's lock and wait for the last image of a batch, and "
        f"{cost[ours] - cost[all_cores]:+,.0f} µs for order, reading and checksums.",
    ]


def write_report(result: dict[str, Any], console: Console) -> None:
    now = datetime.datetime.now(datetime.UTC)
    result = {"date": now.isoformat(timespec="minutes"), "cpu": cpu_model(), **result}
    lines, table = way_from_the_floor(result), rows(result)

    shown = Table(*COLUMNS)
    for row in table:
        shown.add_row(*row)
    console.print(shown)
    for line in lines:
        console.print(line)

    versions = {", ".join(f"{k} {v}" for k, v in has.items()): [] for has in result["versions"].values()}
    for title, has in result["versions"].items():
        versions[", ".join(f"{k} {v}" for k, v in has.items())].append(title)
    numbers = result["arguments"]
    text = [
        f"# Peers, {result['cpu']}, {result['cores']} cores, {now:%Y-%m-%d}",
        "",
        f"`{result['command']}`: {numbers['samples']} images a pass, batch {numbers['batch']}, medians of "
        f"{numbers['rounds']} rounds; `maestream is` compares within a round; `crops apart` is the mean difference "
        "of pixels from ours, in grey levels.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "--:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        *lines,
        "",
        *(f"- {', '.join(titles)}: {packages}" for packages, titles in versions.items()),
    ]
    name = re.sub(r"[^a-z0-9]+", "-", f"{now:%Y-%m-%d}-peers-{result['cpu']}".lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text("\n".join(text) + "\n")
    console.print(f"written: {RESULTS / name}.md and .json")
