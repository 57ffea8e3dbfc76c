"""`maestream bench`: what this machine does."""

import datetime
import json
import logging
import shlex
import sys
from typing import Any

import click
from rich import box
from rich.table import Table

from cluster.terminal import console, progress_bar, write_file

WARNINGS = 5  # that are shown
BOUNDS = {
    "storage": "storage bounds: {busy:.0%} of the time is a wait for bytes. Keep a part of them on this machine's "
    "disk (--cache, or data.cache in training), or bring them nearer",
    "reading": "reading bounds: its one thread is busy {busy:.0%} of the time. More workers on the machine would help",
    "decoding": "decoding bounds: its threads are busy {busy:.0%} of the time. More cores would help",
    None: "nothing is busy all the time, decoding {busy:.0%} of it: stages wait for each other. A larger global "
    "batch may help",
}


@click.group()
def bench() -> None:
    """Measure what this machine does."""


@bench.command()
@click.argument("data", nargs=-1, required=True)
@click.option(
    "--decoder",
    "decoders",
    type=click.Choice(["cpu", "dali"]),
    multiple=True,
    help="An executor; may be given again. All that exist here without it.",
)
@click.option(
    "--size", type=click.IntRange(min=1), default=224, show_default=True, help="Of a crop, in pixels."
)
@click.option("--global-batch", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="That decode; as many as cores without it.")
@click.option("--cache", help="A folder in which a part of the dataset is kept.")
@click.option("--cache-gb", type=float, help="How large that part may become.")
@click.option(
    "--seconds",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="How long each row is measured.",
)
@click.option("--json", "file", type=click.Path(dir_okay=False, writable=True), help="Write all numbers.")
def loader(
    data: tuple[str, ...],
    decoders: tuple[Any, ...],
    size: int,
    global_batch: int,
    threads: int | None,
    cache: str | None,
    cache_gb: float | None,
    seconds: int,
    file: str | None,
) -> None:
    """Images a second from each store by each executor, and where the time goes.

    DATA are datasets. Batches are taken as fast as they come, as one worker alone gets them. A stage is µs of a
    thread for an image, and its share; the floor is one core that decodes and resizes on the CPU, and nothing else.
    """
    from pipeline.bench import Plan, bench_loader, cpu_model, executors_here
    from pipeline.cores import available_cores
    from pipeline.decode import make_decoder
    from pipeline.manifest import open_dataset
    from trainer.config import PretrainConfig
    from trainer.recipe import parse_config
    from trainer.run import fix_order, make_order

    kept = {"cache": cache, "cache_gb": cache_gb}
    config = parse_config(PretrainConfig, {"global_batch": global_batch, "data": kept}, "bench loader")
    threads = threads or available_cores()
    for name in decoders:  # one that is not installed is refused before anything is measured
        make_decoder(name, size, threads).close()
    datasets = [open_dataset(url) for url in dict.fromkeys(data)]
    orders = [make_order(fix_order(config, dataset), dataset) for dataset in datasets]
    executors = decoders or executors_here()
    plan = Plan(
        list(zip(datasets, orders, strict=True)), executors, threads, size, config.data.kept_part, seconds
    )
    warnings = _Warnings()
    logging.getLogger("maestream").addHandler(warnings)
    with progress_bar() as bar:
        task = bar.add_task("", total=round(plan.total_s))
        result = bench_loader(plan, lambda what, seconds: bar.update(task, description=what, advance=seconds))
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "command": shlex.join(["maestream", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "threads": threads,
        "size": size,
        "global_batch": global_batch,
        "cache_gb": cache_gb,
        **result,
    }
    _show(result, list(warnings.texts))
    if file:
        write_file(file, (json.dumps(result, indent=2) + "\n").encode())
        console.print(f"all numbers → {file}")


class _Warnings(logging.Handler):
    """Keeps each text once: a small dataset comes round again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.texts[record.getMessage()] = None


def _show(result: dict[str, Any], warnings: list[str]) -> None:
    for text in warnings[:WARNINGS]:
        console.print(f"warning: {text}", style="yellow")
    if len(warnings) > WARNINGS:
        console.print(f"… and {len(warnings) - WARNINGS:,} more warnings", style="yellow")
    for dataset in result["datasets"]:
        _show_store(dataset, [row for row in result["rows"] if row["store"] == dataset["store"]])


def _show_store(dataset: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    title = f"{dataset['store']}: µs of a thread for an image, and their share"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("executor", no_wrap=True)
    for name in ("img/s", *rows[0]["stages"], "of floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        stages = map(_cell, row["stages"].values())
        table.add_row(row["executor"], f"{row['img_per_s']:,.0f}", *stages, f"{row['of_floor']:.0%}")
    console.print(table)
    console.print(f"the floor: one core decodes and resizes {dataset['one_core_img_per_s']:,.0f} img/s")
    for row in rows:
        text = BOUNDS[row["bound"]].format(busy=row["busy"][row["bound"] or "decoding"])
        console.print(f"{row['executor']}: {text}")
        if row["bad_samples"]:
            console.print(
                f"{row['bad_samples']:,} bad samples: `maestream shards verify` names them", style="yellow"
            )


def _cell(stage: dict[str, float] | None) -> str:
    return f"{stage['us_per_image']:,.0f} {stage['share']:3.0%}" if stage else "in decode"
