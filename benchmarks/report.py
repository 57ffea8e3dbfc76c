"""The table of `benchmarks.peers`, on the terminal and in benchmarks/results/."""

import datetime
import json
import re
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.bench import cpu_model

RESULTS = Path("benchmarks/results")
OURS = "maestream"
COLUMNS = ("contestant", "workers", "cores busy", "img/s", "min–max", "ours ÷ it", "min–max", "crops apart")
DECODER_ALONE = ("our decoder alone, 1 thread", "our decoder alone, all threads")
YARDSTICK = "ImageFolder + DataLoader, Pillow"


def each_round(result: dict[str, Any], title: str, what: str) -> list[float]:
    return [measured[title][what] for measured in result["rounds"]]


def median(result: dict[str, Any], title: str, what: str) -> float:
    return statistics.median(each_round(result, title, what))


def ours_over(result: dict[str, Any], title: str) -> list[float]:
    """How many times as fast maestream is, in each round."""
    ours, its = each_round(result, OURS, "rate"), each_round(result, title, "rate")
    return [a / b for a, b in zip(ours, its, strict=True)]


def fastest_first(result: dict[str, Any]) -> list[str]:
    return sorted(result["workers"], key=lambda title: -median(result, title, "rate"))


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Of COLUMNS."""
    table = []
    for title in fastest_first(result):
        rates, ratios = each_round(result, title, "rate"), ours_over(result, title)
        apart = result["crops_apart"][title]
        table.append(
            [
                title,
                str(result["workers"][title]),
                f"{median(result, title, 'cores'):.2f}",
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f}–{max(rates):,.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f}–{max(ratios):.2f}",
                "its own" if apart is None else f"{apart:.2f}",
            ]
        )
    return table


def summary(result: dict[str, Any]) -> str:
    best = next(title for title in fastest_first(result) if title != OURS and title not in DECODER_ALONE)
    return (
        f"maestream is {statistics.median(ours_over(result, YARDSTICK)):.2f} × {YARDSTICK}, and "
        f"{statistics.median(ours_over(result, best)):.2f} × the fastest peer, {best}."
    )


def way_from_the_floor(result: dict[str, Any]) -> list[str]:
    """Where the time of an image goes, in µs of one core: each step adds what the one before has not."""
    cores = result["cores"]
    one, all_threads, ours = (median(result, title, "rate") for title in (*DECODER_ALONE, OURS))
    decoder, threads, loader = 1e6 / one, cores * 1e6 / all_threads, cores * 1e6 / ours
    return [
        f"The floor: one core decodes and resizes {one:,.0f} img/s with nothing else to do, {cores} would "
        f"{cores * one:,.0f}; maestream is at {ours / (cores * one):.0%} of it.",
        f"An image costs {decoder:,.0f} µs of a core in the decoder, {threads - decoder:+,.0f} µs because "
        f"{cores} threads share memory and Python's lock and wait for the last image of a batch, and "
        f"{loader - threads:+,.0f} µs for order, reading and checksums.",
    ]


def disturbance(result: dict[str, Any]) -> str:
    others = [run["others"] for measured in result["rounds"] for run in measured.values()]
    return (
        f"Other processes used {max(statistics.median(others), 0):.2f} of the {result['cores']} cores in the median run, "
        f"{max(others):.2f} at most."
        + (" The machine was not quiet: measure again." if max(others) > result["quiet"] else "")
    )


def write_report(result: dict[str, Any], console: Console) -> None:
    now = datetime.datetime.now(datetime.UTC)
    result = {"date": now.isoformat(timespec="minutes"), "cpu": cpu_model(), **result}
    lines, table = [summary(result), *way_from_the_floor(result), disturbance(result)], rows(result)

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
        f"{numbers['rounds']} rounds; `ours ÷ it` compares within a round; `crops apart` is the mean difference "
        "of pixels from ours, in grey levels.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "--:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        *lines,
        "",
        *(f"- {'; '.join(titles)}: {packages}" for packages, titles in versions.items()),
    ]
    name = re.sub(r"[^a-z0-9]+", "-", f"{now:%Y-%m-%d}-peers-{result['cpu']}".lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text("\n".join(text) + "\n")
    console.print(f"written: {RESULTS / name}.md and .json")
