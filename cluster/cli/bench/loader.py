"""`maestream bench loader`: measure how fast batches come."""

import logging
from typing import Any

import click
from rich import box
from rich.table import Table

from cluster.cli.bench.common import (
    BOTTLENECKS,
    bad_samples_line,
    describe_invocation,
    json_option,
    write_results,
)
from cluster.cli.options import NumberRange
from cluster.terminal.console import console, progress_bar
from pipeline.text import plural

MAX_WARNINGS = 5  # printed; the rest is counted


@click.command()
@click.argument("data", nargs=-1, required=True)
@click.option(
    "--decoder",
    "decoders",
    type=click.Choice(["cpu", "dali"]),
    multiple=True,
    help="Decoder to measure; may be repeated.  [default: all that work on this machine]",
)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    default=224,
    show_default=True,
    help="Height and width of the crops in pixels.",
)
@click.option(
    "--global-batch",
    type=click.IntRange(min=1),
    metavar="N",
    default=256,
    show_default=True,
    help="Number of images per batch.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of decoder threads.  [default: number of CPU cores]",
)
@click.option(
    "--cache", metavar="FOLDER", help="Folder to cache a part of each dataset in; needs --cache-gb."
)
@click.option(
    "--cache-gb",
    type=NumberRange(min=0, min_open=True),
    metavar="GB",
    help="Maximum size of the cache in GB.",
)
@click.option(
    "--seconds",
    type=click.IntRange(min=1),
    metavar="N",
    default=10,
    show_default=True,
    help="Duration of each measurement in seconds.",
)
@json_option
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
    """Measure images per second, and where the time goes.

    DATA are one or more datasets, each of which is read with each decoder. Batches are taken as fast as they come, as a
    single worker would get them. The table shows the thread time of each stage, in µs per image and as a share of all
    stages. "efficiency" is relative to the same number of cores that do nothing but decode and resize.
    """
    from pipeline.cpus import available_cores
    from pipeline.dataset.dataset import open_dataset
    from pipeline.decode.factory import make_decoder
    from pipeline.loading.benchmark import Plan, available_decoders, bench_loader, cpu_model
    from trainer.config.recipe import parse_config
    from trainer.config.schema import PretrainConfig
    from trainer.run.run import fix_order, make_order

    cache_keys = {"cache": cache, "cache_gb": cache_gb}
    config = parse_config(PretrainConfig, {"global_batch": global_batch, "data": cache_keys}, "bench loader")
    threads = threads or available_cores()
    for name in decoders:  # raises UserError, before anything is measured, if one is not installed
        make_decoder(name, size, threads).close()
    datasets = [open_dataset(url) for url in dict.fromkeys(data)]
    orders = [make_order(fix_order(config, dataset), dataset) for dataset in datasets]
    plan = Plan(
        list(zip(datasets, orders, strict=True)),
        decoders or available_decoders(),
        threads,
        size,
        config.data.disk_cache,
        seconds,
    )
    warnings = _Warnings()
    logging.getLogger("maestream").addHandler(warnings)
    with progress_bar() as bar:
        task = bar.add_task("", total=round(plan.total_s))
        measured = bench_loader(
            plan, lambda what, seconds: bar.update(task, description=what, advance=seconds)
        )
    result = describe_invocation() | {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "threads": threads,
        "size": size,
        "global_batch": global_batch,
        "cache_gb": cache_gb,
        **measured,
    }
    _print_warnings(list(warnings.texts))
    for dataset in result["datasets"]:
        _print_table(dataset, [row for row in result["rows"] if row["store"] == dataset["store"]])
    write_results(file, result)


class _Warnings(logging.Handler):
    """Collects the texts of warnings, each once: a benchmark reads a small dataset many times."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.texts[record.getMessage()] = None


def _print_warnings(warnings: list[str]) -> None:
    for text in warnings[:MAX_WARNINGS]:
        console.print(f"warning: {text}", style="yellow")
    if len(warnings) > MAX_WARNINGS:
        console.print(f"… and {plural(len(warnings) - MAX_WARNINGS, 'more warning')}", style="yellow")


def _print_table(dataset: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print the results of one dataset, a row for each decoder."""
    title = f"{dataset['store']}: thread time per image in µs, and its share"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("decoder", no_wrap=True)
    for name in ("img/s", *rows[0]["stages"], "efficiency"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        stages = map(_cell, row["stages"].values())
        table.add_row(row["executor"], f"{row['img_per_s']:,.0f}", *stages, f"{row['of_floor']:.0%}")
    console.print(table)
    console.print(f"one core that only decodes and resizes: {dataset['one_core_img_per_s']:,.0f} img/s")
    for row in rows:
        advice = BOTTLENECKS[row["bound"]].format(busy=row["busy"][row["bound"] or "decoding"])
        console.print(f"{row['executor']}: {advice}")
        if row["bad_samples"]:
            console.print(bad_samples_line(row["bad_samples"]), style="yellow")


def _cell(stage: dict[str, float] | None) -> str:
    return f"{stage['us_per_image']:,.0f} {stage['share']:3.0%}" if stage else "in decode"
