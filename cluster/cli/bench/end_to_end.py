"""`maestream bench end-to-end`: measure whether the loader keeps up with the training step."""

import io
from typing import Any

import click

from cluster.cli.bench.common import (
    BOTTLENECKS,
    bad_samples_line,
    describe_device,
    describe_invocation,
    load_step_config,
    step_options,
    write_results,
)
from cluster.cli.bench.step import PARTS_MS
from cluster.cli.options import OVERRIDES
from cluster.terminal.console import console, progress_bar, write_file

STEP_BOTTLENECK = (
    "bottleneck: the step. The loader alone is {ratio:.2f} times as fast. More or faster GPUs would help, or a smaller "
    "decoder (model.decoder_depth=1 costs fine-tuning hardly any accuracy: MAE paper, Table 1a)"
)
SHARED_CORES = (
    "loader and step share the CPU cores: together they can reach {limit:,.0f} img/s at most, and reach {share:.0%} of "
    "that"
)
MIN_SHARE = 0.005  # of a step's time, for a stage to be printed
MIN_LABEL = 0.06  # of a step's time, for a bar to be wide enough for its label
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


@click.command("end-to-end", epilog=OVERRIDES)
@click.argument("data")
@click.option(
    "--config",
    "recipe",
    required=True,
    type=click.Path(dir_okay=False),
    help="Recipe: a YAML file such as those in recipes/.",
)
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@step_options
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, writable=True),
    help="Write a chart of where a step's time goes to this PNG file.",
)
def end_to_end(
    data: str,
    recipe: str,
    overrides: tuple[str, ...],
    batch: int | None,
    seconds: float,
    file: str | None,
    picture: str | None,
) -> None:
    """Measure whether the loader keeps up with the training step.

    Measures the loader of the dataset DATA alone, the training step alone, and both together; prints which of them is the
    bottleneck, and what would help."""
    from pipeline.dataset.dataset import open_dataset
    from trainer.config.device import best_device
    from trainer.run.run import fix_order
    from trainer.train.benchmark import measure_end_to_end

    device = best_device()
    dataset = open_dataset(data)
    config = fix_order(load_step_config(recipe, overrides, batch, device.type), dataset)
    with progress_bar() as bar:
        task = bar.add_task("", total=round(3.5 * seconds))
        measured = measure_end_to_end(
            config, dataset, device, seconds, lambda stage, s: bar.update(task, description=stage, advance=s)
        )
    result = (
        describe_invocation()
        | describe_device(device, config)
        | {"data": dataset.store.url, "recipe": recipe, "batch": config.global_batch}
        | measured
    )
    for line in result_lines(result, device.type == "cpu"):
        console.print(line)
    if picture:
        write_file(picture, draw_step(result))
        console.print(f"wrote the chart to {picture}")
    write_results(file, result)


def result_lines(result: dict[str, Any], shares_cores: bool) -> list[str]:
    """Return the measured rates, the bottleneck and what would help, as lines of text.

    Args:
        result: what `trainer.train.benchmark.measure_end_to_end` returns.
        shares_cores: whether the model runs on the CPU cores, too.
    """
    loader, step, both = result["loader"], result["step"], result["both"]
    shares = ", ".join(
        f"{name.replace('_', ' ')} {share:.0%}"
        for name, share in both["shares"].items()
        if share >= MIN_SHARE
    )
    lines = [
        f"loader alone {loader['img_per_s']:,.0f} img/s, step alone {step['img_per_s']:,.0f} img/s, both together "
        f"{both['img_per_s']:,.0f} img/s: {result['of_slower']:.1%} of the slower one",
        f"time of a step, both together: {shares}",
    ]
    if shares_cores:
        limit = 1 / (1 / loader["img_per_s"] + 1 / step["img_per_s"])
        lines.append(SHARED_CORES.format(limit=limit, share=both["img_per_s"] / limit))
    if result["bound"] == "step":
        lines.append(STEP_BOTTLENECK.format(ratio=loader["img_per_s"] / step["img_per_s"]))
    else:
        from pipeline.loading.benchmark import bottleneck

        stage = bottleneck(loader["busy"])
        advice = BOTTLENECKS[stage].format(busy=loader["busy"][stage or "decoding"])
        lines.append(f"bottleneck: the loader. In it, {advice}")
    if loader["bad_samples"]:
        lines.append(bad_samples_line(loader["bad_samples"]))
    return lines


def draw_step(result: dict[str, Any]) -> bytes:
    """Return a PNG bar chart: ms of a step by stage, for the loader alone, the step alone, and both together."""
    from matplotlib.figure import Figure

    loader, step, both = result["loader"], result["step"], result["both"]
    both_ms = 1000 * result["batch"] / both["img_per_s"]
    # The reading thread and the decoder threads work at the same time, so each gets a bar.
    thread_ms = loader["thread_ms_per_step"]
    bars = {
        "both together": {name.replace("_", " "): share * both_ms for name, share in both["shares"].items()},
        "step alone": {name.removesuffix("_ms"): step[name] for name in PARTS_MS},
        f"{loader['threads']} decoder threads": {
            name: thread_ms[name] / loader["threads"] for name in ("decode", "resize", "copy")
        },
        "reading thread": {name: thread_ms[name] for name in ("storage", "read")},
    }
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    for place, stages in enumerate(bars.values()):
        left = 0.0
        for stage, ms in stages.items():
            if ms > 0:
                axis.barh(place, ms, left=left, edgecolor="white", color=COLOURS[stage])
                if ms > MIN_LABEL * both_ms:
                    axis.text(
                        left + ms / 2, place, f"{stage}\n{ms:,.0f}", ha="center", va="center", fontsize=8
                    )
                left += ms
    axis.set_yticks(range(len(bars)), list(bars))
    axis.invert_yaxis()
    axis.set_xlabel(f"ms per step of {result['batch']} images")
    axis.set_title(
        f"{result['device']}: {both['img_per_s']:,.0f} img/s, bottleneck: the {result['bound']}", fontsize=10
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
