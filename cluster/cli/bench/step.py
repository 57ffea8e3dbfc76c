"""`maestream bench step`: measure the training step of a recipe's model."""

from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.cli.bench.common import (
    describe_device,
    describe_invocation,
    load_step_config,
    step_options,
    write_results,
)
from cluster.cli.options import OVERRIDES
from cluster.terminal.console import console, progress_bar
from pipeline.errors import UserError

PARTS_MS = ("forward_ms", "backward_ms", "optimizer_ms")
MIN_TABLE_WIDTH = 120  # characters: rich assumes 80 without a terminal, which would cut the table off


@click.command(epilog=OVERRIDES)
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE... [key=value]...")
@step_options
def step(recipes: tuple[str, ...], batch: int | None, seconds: float, file: str | None) -> None:
    """Measure the training step of a recipe's model.

    The images are already on the device. Each recipe is measured in the three variants of the MAE paper's Table 2: mask
    tokens in the encoder and a decoder of 8 blocks (the baseline), no mask tokens in the encoder, and also a decoder of 1
    block.

    "speed-up" is relative to the baseline; "by FLOPs" is the speed-up to expect from the FLOPs, and "paper" the published
    one. FLOPs are those of a forward and a backward pass, without recomputation. "of peak" compares them with the fastest
    matrix multiplication measured on the device.
    """
    from trainer.config.device import best_device
    from trainer.train.benchmark import measure_step, table_2

    files = [word for word in recipes if "=" not in word]
    overrides = tuple(word for word in recipes if "=" in word)
    device = best_device()
    configs = {name: load_step_config(name, overrides, batch, device.type) for name in files}
    if not configs:
        raise UserError("give at least one recipe, for example recipes/pretrain_vit_base.yaml")
    result = describe_invocation() | describe_device(device, configs[files[0]]) | {"rows": []}
    with progress_bar() as bar:
        task = bar.add_task("", total=round(3 * len(configs) * seconds))
        for name, config in configs.items():
            for title, model in table_2(config.model).items():
                bar.update(task, description=f"{name}, {title}")
                changed = config.model_copy(update={"model": model})
                measured = measure_step(changed, device, seconds, lambda s: bar.update(task, advance=s))
                row = {"recipe": name, "what": title, "batch": config.global_batch, **measured}
                result["rows"].append(row | {"of_peak": measured["tflop_per_s"] / result["peak_tflop_per_s"]})
                if not console.is_terminal:
                    console.print(f"{name}, {title}: {measured['img_per_s']:,.1f} img/s")
    add_speedups(result["rows"], {name: config.model.width for name, config in configs.items()})
    print_steps(result)
    write_results(file, result)


def add_speedups(rows: list[dict[str, Any]], widths: dict[str, int]) -> None:
    """Add to each row its speed-up over the baseline of its recipe: measured, expected from the FLOPs, and published.

    Args:
        rows: the rows of all recipes, changed in place.
        widths: encoder width of each recipe's model. The paper has results for some of them; "paper" is None for others.
    """
    from trainer.train.benchmark import BASELINE, PAPER

    baselines = {row["recipe"]: row for row in rows if row["what"] == BASELINE}
    for row in rows:
        base = baselines[row["recipe"]]
        row["faster"] = row["img_per_s"] / base["img_per_s"]
        row["faster_by_flops"] = base["gflop_per_image"] / row["gflop_per_image"]
        row["paper"] = PAPER.get(widths[row["recipe"]], {}).get(row["what"])


def print_steps(result: dict[str, Any]) -> None:
    console.print(
        f"{result['device']}, {result['precision']}: peak of matrix multiplication {result['peak_tflop_per_s']:,.2f} "
        "TFLOP/s (measured)"
    )
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["recipe"] == recipe]
        title = f"{recipe}: {rows[0]['batch']} images per step, times in ms"
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("", no_wrap=True)
        numbers = ("img/s", "forward", "backward", "optimizer", "GB", "GFLOP/image", "of peak")
        for name in (*numbers, "speed-up", "by FLOPs", "paper"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(
                row["what"],
                f"{row['img_per_s']:,.1f}",
                *(f"{row[part]:,.1f}" for part in PARTS_MS),
                "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}",
                f"{row['gflop_per_image']:,.1f}",
                f"{row['of_peak']:.0%}",
                f"{row['faster']:.2f}",
                f"{row['faster_by_flops']:.2f}",
                f"{row['paper']}" if row["paper"] else "",
            )
        Console(file=console.file, width=max(console.width, MIN_TABLE_WIDTH), markup=False).print(table)
