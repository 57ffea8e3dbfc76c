"""`maestream study`: run an ablation study of the MAE paper, its trials in parallel Ray tasks."""

import os
import signal
from typing import TYPE_CHECKING

import click

from cluster.terminal.console import console, progress_counter
from pipeline.dataset.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from pipeline.text import plural

if TYPE_CHECKING:
    from trainer.config.schema import RunConfig


@click.command(
    epilog="Arguments such as pretrain.epochs=100 override a key of a recipe in all trials. Run the same command again to "
    "resume."
)
@click.argument("name")
@click.option(
    "--pretrain",
    "pretraining",
    required=True,
    metavar="FILE",
    help="Recipe to pre-train with, as changed by each trial.",
)
@click.option("--finetune", "finetuning", metavar="FILE", help="Recipe to fine-tune each encoder with.")
@click.option("--linprobe", "probing", metavar="FILE", help="Recipe to probe each encoder with.")
@click.option("--data", required=True, metavar="DATASET", help="Dataset to train on.")
@click.option(
    "--val", required=True, metavar="DATASET", help="Dataset to evaluate on, with the same classes."
)
@click.option(
    "--out",
    required=True,
    metavar="FOLDER",
    help="Folder for all runs, results.csv and plot.png.",
)
@click.option(
    "--tasks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of parallel trials.  [default: one per GPU, or one per CPU core without a GPU]",
)
@click.argument("overrides", nargs=-1, metavar="[RECIPE.key=value]...")
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
    """Run an ablation study of the MAE paper.

    NAME is masking-ratio, mask-sampling, mask-token, decoder-depth, decoder-width, target, augmentation or schedule. A study
    has several trials. Each pre-trains a model with one setting changed, then fine-tunes or probes its encoder. Results are
    written to results.csv and plot.png after each trial.
    """
    from cluster.runtime.task_pool import task_pool
    from trainer.run.lease import Lease
    from trainer.studies.study import (
        RESULTS,
        load_study,
        make_trial_jobs,
        prepare_study,
        read_results,
        run_trial,
        write_results,
    )

    files = {"pretrain": pretraining, "finetune": finetuning, "linprobe": probing}
    recipes = _load_recipes({task: file for task, file in files.items() if file}, overrides)
    definition, dataset, val_dataset = load_study(name), open_dataset(data), open_dataset(val)
    store = open_store(out)
    jobs = make_trial_jobs(definition, recipes, dataset.store.url, val_dataset.store.url, store.url)
    # If the lease is lost, interrupt this process as Ctrl-C does.
    with Lease(store, console.print, lambda: os.kill(os.getpid(), signal.SIGINT)) as lease:
        try:
            prepare_study(name, recipes, dataset, val_dataset, store)
            rows = read_results(store)
            done = {row["trial"] for row in rows}
            console.print(
                f"{plural(len(definition.trials), 'trial')}, {len(done)} of them done; their runs are in {store.url}"
            )
            with (
                task_pool(tasks, runs_model=True) as run,
                progress_counter("trials", len(definition.trials)) as advance,
            ):
                advance(len(done))
                for row in run(run_trial, [job for job in jobs if job.trial not in done]):
                    rows.append(row)
                    write_results(store, definition, rows)
                    advance(1)
                    measures = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "trial")
                    console.print(f"{row['trial']}: {measures}")
        except KeyboardInterrupt:
            if lease.lost:
                raise UserError(f"another process has taken over {store.url}: this one has stopped") from None
            raise
    console.print(f"wrote {store.describe(RESULTS)}")


def _load_recipes(files: dict[str, str], overrides: tuple[str, ...]) -> "dict[str, RunConfig]":
    """Return the config of each recipe, with its overrides applied.

    Args:
        files: recipe files by command (pretrain, finetune, linprobe).
        overrides: "COMMAND.key=value". UserError if there is no recipe for the command.
    """
    from trainer.config.recipe import CONFIG_TYPES, load_config

    overrides_of: dict[str, list[str]] = {task: [] for task in files}
    for override in overrides:
        task, _, key_value = override.partition(".")
        if task not in files:
            raise UserError(
                f"{override}: expected RECIPE.key=value where RECIPE is {' or '.join(files)}, for example pretrain.epochs=100"
            )
        overrides_of[task].append(key_value)
    # A trial sets `init` to the model that it has pre-trained.
    keys = {"pretrain": None, "finetune": {"init": "scratch"}, "linprobe": {"init": "scratch"}}
    return {
        task: load_config(CONFIG_TYPES[task], file, tuple(overrides_of[task]), keys[task])
        for task, file in files.items()
    }
