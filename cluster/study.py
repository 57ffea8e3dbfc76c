"""`maestream study`: the paper's studies as Ray tasks."""

import os
import signal

import click

from cluster.terminal import console, counting
from pipeline.errors import UserError
from pipeline.manifest import open_dataset
from pipeline.storage import open_store


@click.command()
@click.argument("name")
@click.option(
    "--pretrain", "pretraining", required=True, help="Recipe of pre-training; each trial changes one thing."
)
@click.option("--finetune", "finetuning", help="Recipe by which encoders are fine-tuned.")
@click.option("--linprobe", "probing", help="Recipe by which encoders are probed.")
@click.option("--data", required=True, help="The dataset.")
@click.option("--val", required=True, help="The dataset to be evaluated on.")
@click.option(
    "--out",
    required=True,
    help="Folder of all runs, results.csv and plot.png; the same command again resumes.",
)
@click.option("--tasks", type=click.IntRange(min=1), help="Trials at once.  [default: one a GPU, or a core]")
@click.argument("overrides", nargs=-1, metavar="[recipe.key=value]...")
def study(
    name: str,
    pretraining: str,
    finetuning: str | None,
    probing: str | None,
    data: str,
    val: str,
    out: str,
    tasks: int | None,
    overrides: tuple[str, ...],
) -> None:
    """One of the paper's studies: masking-ratio, mask-sampling, mask-token, decoder-depth, decoder-width, target,
    augmentation, schedule. Of all trials something may be changed, pretrain.epochs=100 say."""
    from cluster.sharding import ray_tasks
    from trainer.config import RunConfig
    from trainer.lease import Lease
    from trainer.recipe import KINDS, load_config
    from trainer.study import (
        RESULTS,
        begin_study,
        jobs_of,
        load_study,
        read_results,
        run_trial,
        write_results,
    )

    given = {"pretrain": pretraining, "finetune": finetuning, "linprobe": probing}
    changes: dict[str, list[str]] = {kind: [] for kind, path in given.items() if path}
    for override in overrides:
        kind, _, change = override.partition(".")
        if kind not in changes:
            raise UserError(f"{override}: begin with {', '.join(changes)}, as in pretrain.epochs=100")
        changes[kind].append(change)
    recipes: dict[str, RunConfig] = {
        kind: load_config(
            KINDS[kind], path, tuple(changes[kind]), None if kind == "pretrain" else {"init": "scratch"}
        )
        for kind, path in given.items()
        if path
    }
    wanted, dataset, asked = load_study(name), open_dataset(data), open_dataset(val)
    store = open_store(out)
    jobs = jobs_of(wanted, recipes, dataset.store.url, asked.store.url, store.url)
    # A lease that is lost interrupts this process.
    with Lease(store, console.print, lambda: os.kill(os.getpid(), signal.SIGINT)) as lease:
        try:
            begin_study(name, recipes, dataset, asked, store)
            rows = read_results(store)
            done = {row["trial"] for row in rows}
            console.print(
                f"{len(wanted.trials)} trials, {len(done)} of them done, each in a folder of {store.url}"
            )
            with ray_tasks(tasks, models=True) as run, counting("trials", len(wanted.trials)) as more:
                more(len(done))
                for row in run(run_trial, [job for job in jobs if job.trial not in done]):
                    rows.append(row)
                    write_results(store, wanted, rows)
                    more(1)
                    said = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "trial")
                    console.print(f"{row['trial']}: {said}")
        except KeyboardInterrupt:
            if lease.lost:
                raise UserError(f"somebody else has taken {store.url} over: this one has stopped") from None
            raise
    console.print(f"→ {store.describe(RESULTS)}")
