"""`maestream bench step` and `maestream bench end-to-end`: how fast a training step is, and whether the loader keeps up."""

import datetime
import io
import json
import shlex
import sys
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.bench import BOUNDS
from cluster.terminal import console, progress_bar, write_file
from pipeline.errors import UserError

OF_STEP = (
    "the step bounds: the loader alone would be {more:.2f} times as fast. A faster or another GPU would help, or a smaller "
    "decoder (model.decoder_depth=1 costs fine-tuning nothing: paper, Table 1a)"
)
SHARED = "both run on the same cores, so {shared:,.0f} img/s is what they can do at most, and {of_shared:.0%} of it is done"
PARTS_MS = ("forward_ms", "backward_ms", "optimizer_ms")
COLOURS = {
    "data wait": "#d62728",
    "storage": "#ff9896",
    "read": "#f7b6d2",
    "host to device": "#ffbb78",
    "copy": "#ffbb78",
    "step": "#2ca02c",
    "forward": "#98df8a",
    "backward": "#5fbf60",
    "optimizer": "#c5e8c0",
    "decode": "#aec7e8",
    "resize": "#c6dbef",
    "all reduce": "#c5b0d5",
    "checkpoint": "#c49c94",
    "other": "#c7c7c7",
}


def options(command: Any) -> Any:
    """What both commands take."""
    for option in reversed(
        (
            click.option(
                "--batch", type=click.IntRange(min=1), help="Images at once.  [default: 256 on a GPU, else 8]"
            ),
            click.option(
                "--seconds",
                type=click.FloatRange(min=0, min_open=True),
                default=10,
                show_default=True,
                help="How long each is measured.",
            ),
            click.option(
                "--json", "file", type=click.Path(dir_okay=False, writable=True), help="Write all numbers."
            ),
        )
    ):
        command = option(command)
    return command


@click.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE... [key=value]...")
@options
def step(recipes: tuple[str, ...], batch: int | None, seconds: float, file: str | None) -> None:
    """How fast the training step of a recipe's model is, on images that are on the device already.

    Three of each: with mask tokens in the encoder and a decoder of 8 blocks, the baseline of the paper's Table 2;
    without them; and with a decoder of 1 block. FLOPs are counted, of work really done, and are beside what the
    device's fastest product of matrices does.
    """
    from trainer.bench import measure_step, table_2
    from trainer.device import best_device

    files = [word for word in recipes if "=" not in word]
    overrides = tuple(word for word in recipes if "=" in word)
    device = best_device()
    configs = {name: _config(name, overrides, batch, device.type) for name in files}
    if not configs:
        raise UserError("name a recipe, recipes/pretrain_vit_base.yaml say")
    result = _about(device, configs[files[0]]) | {"rows": []}
    with progress_bar() as bar:
        task = bar.add_task("", total=round(3 * len(configs) * seconds))
        for name, config in configs.items():
            for title, model in table_2(config.model).items():
                bar.update(task, description=f"{name}, {title}")
                changed = config.model_copy(update={"model": model})
                found = measure_step(changed, device, seconds, lambda s: bar.update(task, advance=s))
                row = {"recipe": name, "what": title, "batch": config.global_batch, **found}
                result["rows"].append(row | {"of_peak": found["tflop_per_s"] / result["peak_tflop_per_s"]})
                if not console.is_terminal:
                    console.print(f"{name}, {title}: {found['img_per_s']:,.1f} img/s")
    compare(result["rows"], {name: config.model.width for name, config in configs.items()})
    show_steps(result)
    _write(file, result)


def compare(rows: list[dict[str, Any]], widths: dict[str, int]) -> None:
    """Add to each row how much faster it is than its recipe's baseline, and by FLOPs should be; the paper's, if it has that
    model."""
    from trainer.bench import BASELINE, PAPER

    baselines = {row["recipe"]: row for row in rows if row["what"] == BASELINE}
    for row in rows:
        base = baselines[row["recipe"]]
        row["faster"] = row["img_per_s"] / base["img_per_s"]
        row["faster_by_flops"] = base["gflop_per_image"] / row["gflop_per_image"]
        row["paper"] = PAPER.get(widths[row["recipe"]], {}).get(row["what"])


def show_steps(result: dict[str, Any]) -> None:
    console.print(
        f"{result['device']}, {result['precision']}: matrices are multiplied at {result['peak_tflop_per_s']:,.2f} TFLOP/s"
    )
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["recipe"] == recipe]
        title = f"{recipe}, {rows[0]['batch']} images at once; ms of a step's parts"
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("", no_wrap=True)
        numbers = ("img/s", "forward", "backward", "optimizer", "GB", "GFLOP/image", "of peak")
        for name in (*numbers, "faster", "by FLOPs", "paper"):
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
        # Whole, also where there is no terminal: that is taken for 80 columns.
        Console(file=console.file, width=max(console.width, 120), markup=False).print(table)


@click.command("end-to-end")
@click.argument("data")
@click.option("--config", "recipe", required=True, type=click.Path(dir_okay=False), help="A recipe.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@options
@click.option("--picture", type=click.Path(dir_okay=False, writable=True), help="Draw a step, a PNG.")
def end_to_end(
    data: str,
    recipe: str,
    overrides: tuple[str, ...],
    batch: int | None,
    seconds: float,
    file: str | None,
    picture: str | None,
) -> None:
    """The loader alone, the training step alone, and both together: which of the two bounds, and what would help."""
    from pipeline.manifest import open_dataset
    from trainer.bench import measure_end_to_end
    from trainer.device import best_device
    from trainer.run import fix_order

    device = best_device()
    dataset = open_dataset(data)
    config = fix_order(_config(recipe, overrides, batch, device.type), dataset)
    with progress_bar() as bar:
        task = bar.add_task("", total=round(3.5 * seconds))
        found = measure_end_to_end(
            config, dataset, device, seconds, lambda what, s: bar.update(task, description=what, advance=s)
        )
    result = (
        _about(device, config)
        | {"data": dataset.store.url, "recipe": recipe, "batch": config.global_batch}
        | found
    )
    for line in lines_of(result, device.type == "cpu"):
        console.print(line)
    if picture:
        write_file(picture, draw_step(result))
        console.print(f"a step → {picture}")
    _write(file, result)


def lines_of(result: dict[str, Any], shares_cores: bool) -> list[str]:
    """What came out, and what would help."""
    loader, step, both = result["loader"], result["step"], result["both"]
    parts = ", ".join(
        f"{name.replace('_', ' ')} {share:.0%}" for name, share in both["shares"].items() if share >= 0.005
    )
    lines = [
        f"loader alone {loader['img_per_s']:,.0f} img/s, step alone {step['img_per_s']:,.0f}, both together "
        f"{both['img_per_s']:,.0f}: {result['of_slower']:.1%} of the slower",
        f"a step of both: {parts}",
    ]
    if shares_cores:
        shared = 1 / (1 / loader["img_per_s"] + 1 / step["img_per_s"])
        lines.append(SHARED.format(shared=shared, of_shared=both["img_per_s"] / shared))
    if result["bound"] == "step":
        lines.append(OF_STEP.format(more=loader["img_per_s"] / step["img_per_s"]))
    else:
        from pipeline.bench import bound

        busiest = bound(loader["busy"])
        lines.append(
            "the loader bounds; of it " + BOUNDS[busiest].format(busy=loader["busy"][busiest or "decoding"])
        )
    if loader["bad_samples"]:
        lines.append(f"{loader['bad_samples']:,} bad samples: `maestream shards verify` names them")
    return lines


def draw_step(result: dict[str, Any]) -> bytes:
    """PNG: what a step's milliseconds go into, for the loader alone, the step alone, and both."""
    from matplotlib.figure import Figure

    loader, step, both = result["loader"], result["step"], result["both"]
    both_ms = 1000 * result["batch"] / both["img_per_s"]
    # A thread reads and the others decode, at the same time: each bar is what one of them has to do.
    spent = loader["thread_ms_per_step"]
    bars = {
        "both together": {name.replace("_", " "): share * both_ms for name, share in both["shares"].items()},
        "step alone": {name.removesuffix("_ms"): step[name] for name in PARTS_MS},
        f"{loader['threads']} decoding threads": {
            name: spent[name] / loader["threads"] for name in ("decode", "resize", "copy")
        },
        "reading thread": {name: spent[name] for name in ("storage", "read")},
    }
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    for place, parts in enumerate(bars.values()):
        left = 0.0
        for part, ms in parts.items():
            if ms > 0:
                axis.barh(place, ms, left=left, edgecolor="white", color=COLOURS[part])
                if ms > 0.06 * both_ms:
                    axis.text(
                        left + ms / 2, place, f"{part}\n{ms:,.0f}", ha="center", va="center", fontsize=8
                    )
                left += ms
    axis.set_yticks(range(len(bars)), list(bars))
    axis.invert_yaxis()
    axis.set_xlabel(f"ms of a step of {result['batch']} images")
    axis.set_title(
        f"{result['device']}: the {result['bound']} bounds, {both['img_per_s']:,.0f} img/s", fontsize=10
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _config(recipe: str, overrides: tuple[str, ...], batch: int | None, kind: str) -> Any:
    from trainer.config import PretrainConfig
    from trainer.recipe import load_config

    n = batch or (256 if kind == "cuda" else 8)
    config = load_config(PretrainConfig, recipe, (f"global_batch={n}", f"micro_batch={n}", *overrides))
    if config.micro_batch == "auto":
        raise UserError("micro_batch=auto is for training: here --batch says it")
    return config


def _about(device: Any, config: Any) -> dict[str, Any]:
    import torch

    from pipeline.bench import cpu_model
    from pipeline.cores import available_cores
    from trainer.bench import matmul_peak
    from trainer.device import autocast, compiles, dtype_of

    with autocast(config, device):
        lowered = torch.is_autocast_enabled(device.type)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "command": shlex.join(["maestream", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "cores": available_cores(),
        "torch": torch.__version__,
        "precision": "bf16" if lowered else str(dtype_of(config)).removeprefix("torch."),
        "compiled": compiles(config, device),
        "peak_tflop_per_s": matmul_peak(config, device) / 1e12,
    }


def _write(file: str | None, result: dict[str, Any]) -> None:
    if file:
        write_file(file, (json.dumps(result, indent=2) + "\n").encode())
        console.print(f"all numbers → {file}")
