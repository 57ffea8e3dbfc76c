"""`maestream report`: how a run is going, or went, as one page."""

import datetime
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.terminal import console, write_file
from pipeline.secrets import without_secrets
from pipeline.storage import open_store

if TYPE_CHECKING:
    from trainer.report import Found

TEMPLATE = Path(__file__).with_name("report.html")
MOST_ROWS = 200  # of a table, the newest
PART_NAMES = {
    "data_wait": "waiting for data",
    "host_to_device": "copies to the device",
    "step": "the step: forward, backward, optimizer",
    "all_reduce": "all-reduces that the backward pass does not hide",
    "checkpoint": "checkpoints",
    "other": "other",
    "untold": "not told apart",
    "restarts": "without a step, between attempts",
}


@click.command()
@click.argument("run")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True),
    default="report.html",
    show_default=True,
    help="Where to write the page.",
)
def report(run: str, out: str) -> None:
    """One page of a run, which may still be going on: curves, where the time went, what happened, what it sees, what it
    is worth, config and versions. It is one file that needs no other, for any browser."""
    from trainer.report import look

    found = look(open_store(run))
    page = draw_page(found).encode(errors="replace")
    write_file(out, page)
    console.print(f"{found.steps:,} steps of {found.store.url}, {len(page) / 1e6:.1f} MB → {out}")


def draw_page(found: "Found") -> str:
    """HTML, in which nothing that the run folder says is anything but text."""
    import jinja2

    from cluster.curves import figures
    from trainer.laps import PARTS
    from trainer.report import judgements, time_spent

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: without_secrets(value) if type(value) is str else value,
    )
    environment.filters |= {"duration": duration, "moment": moment, "number": number}
    judged = {name: _rows(columns) for name, columns in judgements(found).items()}
    spent = {part: seconds for part, seconds in time_spent(found).items() if seconds > 0 or part in PARTS}
    return environment.from_string(TEMPLATE.read_text()).render(
        found=found,
        made=datetime.datetime.now(datetime.UTC).timestamp(),
        state=state_of(found),
        tiles=_tiles(found, spent),
        figures=figures(found),
        spent=spent if sum(spent.values()) else {},
        parts=PART_NAMES,
        events=[event | {"says": said(event)} for event in found.events[-MOST_ROWS:]],
        bad_samples=found.bad_samples[:MOST_ROWS],
        judged={name: rows[-MOST_ROWS:] for name, rows in judged.items()},
        all_judged=judged,
        evaluations=found.evaluations[-MOST_ROWS:],
        versions=_versions(found),
    )


def duration(seconds: float) -> str:
    """Of two units, the larger first."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def moment(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S}"


def number(value: object, digits: int = 0) -> str:
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:,.{digits}f}" if known else "–"


def said(event: dict[str, Any]) -> str:
    """An event in one line, also one of a version that tells of others."""
    from cluster.console import sentence

    try:
        return sentence(event)
    except (KeyError, TypeError, ValueError):
        return json.dumps(event)


def state_of(found: "Found") -> tuple[str, str]:
    """How the run is, in a word and in a sentence."""
    if found.failure:
        return "stopped", found.failure
    if owner := found.owner:
        return "running", f"process {owner.get('pid')} on {owner.get('host')} owns it, if it is still alive"
    committed = found.committed[-1] if found.committed else 0
    if found.steps and found.steps == found.total_steps == committed:
        return "done", "all of its steps are done, and committed"
    last = f"its last commit is of step {committed:,}" if committed else "it has no commit"
    return "not running", last + (": the same command again goes on" if found.total_steps else "")


def _tiles(found: "Found", spent: dict[str, float]) -> list[tuple[str, str, str]]:
    """What a person looks for first: a name, a number, and what explains it."""
    metrics, steps, total = found.metrics, found.steps, found.total_steps
    if not steps:
        return []
    last = {name: float(column[-1]) for name, column in metrics.items()}
    rates = sorted(metrics["img_per_s"])
    committed = ("none", "yet")
    if found.committed:
        committed = (f"step {found.committed[-1]:,}", f"{len(found.committed)} are kept")
    epochs = found.config.epochs
    going = f"in the first of {epochs:g} epochs"
    if total:
        going = f"{steps / total:.0%} of {total:,}: {epochs * steps / total:.1f} of {epochs:g} epochs"
    return [
        ("steps", f"{steps:,}", going),
        ("images", f"{steps * found.config.global_batch:,}", f"{found.config.global_batch:,} a step"),
        ("loss", f"{last['loss']:.4f}", f"began with {metrics['loss'][0]:.4f}"),
        ("images a second", f"{last['img_per_s']:,.0f}", f"median {rates[len(rates) // 2]:,.0f}"),
        ("waiting for data", f"{spent['data_wait'] / (sum(spent.values()) or 1):.1%}", "of all time"),
        ("workers", f"{last['world_size']:.0f}", f"{len(found.known.starts):,} attempts"),
        ("last commit", *committed),
        ("bad samples", f"{len(found.bad_samples):,}", "distinct ones"),
    ]


def _rows(columns: dict[str, Any]) -> list[dict[str, float]]:
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def _versions(found: "Found") -> list[tuple[str, str]]:
    """By attempts that had the same ones."""
    firsts = sorted(found.known.versions)
    lasts = [*(first - 1 for first in firsts[1:]), len(found.known.starts)]
    return [
        (
            f"attempt {first}" if first == last else f"attempts {first} to {last}",
            ", ".join(f"{name} {number}" for name, number in found.known.versions[first].items()),
        )
        for first, last in zip(firsts, lasts, strict=False)
    ]
