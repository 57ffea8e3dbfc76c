"""The report of `benchmarks.peers`: on the terminal and in benchmarks/results/."""

import datetime
import re
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.output import save_result
from pipeline.loading.benchmark import cpu_model

OURS = "maestream"
COLUMNS = ("loader", "workers", "cores busy", "img/s", "min–max", "speed-up", "min–max", "crop difference")
DECODER_ALONE = ("our decoder alone, 1 thread", "our decoder alone, all threads")
BASELINE = "ImageFolder + DataLoader, Pillow"


def each_round(result: dict[str, Any], title: str, what: str) -> list[float]:
    """A loader's measurement `what` in each round."""
    return [measured[title][what] for measured in result["rounds"]]


def median(result: dict[str, Any], title: str, what: str) -> float:
    return statistics.median(each_round(result, title, what))


def speed_ups(result: dict[str, Any], title: str) -> list[float]:
    """How many times as fast as this loader maestream is, in each round."""
    ours, its = each_round(result, OURS, "rate"), each_round(result, title, "rate")
    return [a / b for a, b in zip(ours, its, strict=True)]


def fastest_first(result: dict[str, Any]) -> list[str]:
    return sorted(result["workers"], key=lambda title: -median(result, title, "rate"))


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table, with COLUMNS."""
    table = []
    for title in fastest_first(result):
        rates, ratios = each_round(result, title, "rate"), speed_ups(result, title)
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
                "own crops" if apart is None else f"{apart:.2f}",
            ]
        )
    return table


def summary(result: dict[str, Any]) -> str:
    best = next(title for title in fastest_first(result) if title != OURS and title not in DECODER_ALONE)
    return (
        f"maestream is {statistics.median(speed_ups(result, BASELINE)):.2f} times as fast as {BASELINE}, and "
        f"{statistics.median(speed_ups(result, best)):.2f} times as fast as the fastest other loader, {best}."
    )


def time_per_image(result: dict[str, Any]) -> list[str]:
    """Where the time of an image goes, in µs of one core: in the decoder alone, in threads, in the whole loader."""
    cores = result["cores"]
    one, all_threads, ours = (median(result, title, "rate") for title in (*DECODER_ALONE, OURS))
    decoder, threads, loader = 1e6 / one, cores * 1e6 / all_threads, cores * 1e6 / ours
    return [
        f"One core that only decodes and resizes does {one:,.0f} img/s, {cores} such cores would do "
        f"{cores * one:,.0f}; maestream reaches {ours / (cores * one):.0%} of that.",
        f"An image takes {decoder:,.0f} µs of a core in the decoder, {threads - decoder:+,.0f} µs because "
        f"{cores} threads share memory and the GIL and wait for the last image of a batch, and "
        f"{loader - threads:+,.0f} µs for the data order, reading and checksums.",
    ]


def disturbance(result: dict[str, Any]) -> str:
    others = [run["others"] for measured in result["rounds"] for run in measured.values()]
    return (
        f"Other processes used {max(statistics.median(others), 0):.2f} of the {result['cores']} cores in the median run, and at "
        f"most {max(others):.2f}."
        + (" The machine was not idle: measure again." if max(others) > result["quiet"] else "")
    )


def write_report(result: dict[str, Any], console: Console) -> None:
    now = datetime.datetime.now(datetime.UTC)
    result = {"date": now.isoformat(timespec="minutes"), "cpu": cpu_model(), **result}
    lines, table = [summary(result), *time_per_image(result), disturbance(result)], rows(result)

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
        f"`{result['command']}`: {numbers['samples']} images per pass, batch {numbers['batch']}, medians of "
        f"{numbers['rounds']} rounds. `speed-up` is maestream's rate divided by the loader's in the same round; "
        "`crop difference` is the mean difference of its pixels from ours, in grey levels.",
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
    console.print(save_result(name, result, "\n".join(text) + "\n"))
