"""`maestream checkpoints`: list the checkpoints of a run, and remove those that a retention rule does not keep."""

from dataclasses import dataclass
from typing import Literal

import click
from rich import box
from rich.table import Table

from cluster.report.page import moment, number
from cluster.terminal.console import console, progress_counter
from pipeline.errors import UserError
from pipeline.storage.store import Store, open_store
from pipeline.text import plural

NOTHING_TO_REMOVE = "nothing to remove"


@dataclass(frozen=True)
class RetentionRule:
    """Which checkpoints are kept, see `trainer.config.schema.CheckpointConfig`."""

    keep: int  # number of newest ones
    every: int | None  # steps: the first checkpoint in each such interval is kept, too

    def __str__(self) -> str:
        newest = "the newest checkpoint" if self.keep == 1 else f"the newest {self.keep} checkpoints"
        return newest + (f", and the first of every {self.every:,} steps permanently" if self.every else "")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in the run folder, complete or not."""

    step: int
    files: dict[str, int]  # name → bytes
    # "superseded": written by an attempt after the step from which a later attempt continued, so no longer in the history
    state: Literal["complete", "incomplete", "superseded", "damaged"]
    kept: str | None  # why it is kept; None: it may be removed

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


@click.command()
@click.argument("run")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of newest checkpoints to keep.  [default: checkpoint.keep of the run]",
)
@click.option(
    "--keep-every",
    type=click.IntRange(min=0),
    metavar="STEPS",
    help="Also keep the first checkpoint of every this many steps permanently; 0: none.  [default: checkpoint.keep_every of "
    "the run]",
)
@click.option("--prune", is_flag=True, help="Show which checkpoints are not kept, and their size.")
@click.option("--yes", is_flag=True, help="With --prune: remove them.")
def checkpoints(run: str, keep: int | None, keep_every: int | None, prune: bool, yes: bool) -> None:
    """List the checkpoints of a run, or remove old ones (--prune).

    The table shows which checkpoints the retention rule keeps: that of the run's config, or that of --keep and --keep-every.
    A damaged checkpoint is always kept: check its folder, then remove it yourself. Nothing can be removed while the run is
    training.
    """
    from trainer.run.lease import Lease
    from trainer.run.run import read_config

    if yes and not prune:
        raise UserError("--yes confirms --prune: add --prune")
    store = open_store(run)
    own = read_config(store).checkpoint
    every = own.keep_every if keep_every is None else keep_every
    rule = RetentionRule(keep or own.keep, every or None)
    if not yes:
        found = list_checkpoints(store, rule)
        print_table(store, found, rule)
        if prune:
            print_removable(found)
        return
    with Lease(store, console.print, lambda: None) as lease:  # so that no training starts meanwhile
        remove(store, [one for one in list_checkpoints(store, rule) if one.kept is None], lease.owner)


def list_checkpoints(store: Store, rule: RetentionRule) -> list[Checkpoint]:
    """Return all checkpoints of a run, oldest first.

    Raises:
        UserError: if the run has not started.
    """
    from trainer.run.checkpoint import FOLDER, committed_steps, is_in_history, step_of, steps_to_keep
    from trainer.run.run import read_started_record

    starts = read_started_record(store).starts
    files: dict[int, dict[str, int]] = {}
    for name, size in store.sizes(FOLDER).items():
        if (step := step_of(name)) is not None:
            files.setdefault(step, {})[name] = size
    in_history = {step: is_in_history(store, step, starts) for step in committed_steps(store)}
    history = [step for step, good in in_history.items() if good]
    reasons = dict.fromkeys(steps_to_keep(history, rule.keep, rule.every), "always")
    reasons |= dict.fromkeys(history[-rule.keep :], "newest")
    found = []
    for step in sorted(files):
        if step not in in_history:
            found.append(Checkpoint(step, files[step], "incomplete", None))
        elif in_history[step] is None:  # the run refuses to resume from it, and asks the user to decide
            found.append(Checkpoint(step, files[step], "damaged", "yes"))
        else:
            state: Literal["complete", "superseded"] = "complete" if in_history[step] else "superseded"
            found.append(Checkpoint(step, files[step], state, reasons.get(step)))
    return found


def print_table(store: Store, found: list[Checkpoint], rule: RetentionRule) -> None:
    from trainer.config.schema import PretrainConfig
    from trainer.labels.measures import MEASURES
    from trainer.run.run import read_config, read_started_record

    if not found:
        console.print(f"{store.url} has no checkpoints yet")
        return
    losses, name, scores = read_measures(store, {one.step for one in found})
    record = read_started_record(store)
    label = MEASURES[name].label
    measure = f"kNN {label}" if isinstance(read_config(store), PretrainConfig) else label
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in ("step", "epoch", "size", "written (UTC)", "loss", measure):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state")
    table.add_column("kept")
    for one in found:
        table.add_row(
            f"{one.step:,}",
            number(record.epochs_done(one.step), 1),
            format_size(one.bytes),
            "–" if (at := written_at(store, one)) is None else moment(at)[:-3],
            number(losses.get(one.step), 4),
            f"{scores[one.step]:{MEASURES[name].format}}" if one.step in scores else "–",
            one.state,
            one.kept or "–",
        )
    console.print(table)
    console.print(f"{format_size(sum(one.bytes for one in found))} in total; the rule keeps {rule}")


def read_measures(store: Store, steps: set[int]) -> tuple[dict[int, float], str, dict[int, float]]:
    """Return the known losses of the checkpoints at these steps, the name of the evaluation metric, and its values.

    The name is one of trainer.labels.measures.MAIN: top1 if nothing was evaluated.
    """
    from trainer.labels.measures import MAIN
    from trainer.run.metrics import history

    losses: dict[int, float] = {}
    measured = MAIN[0]
    scores: dict[int, float] = {}
    for row in history(store):  # in order: the row of a repeated step replaces that of the first time
        after = row["step"] + 1  # rows count steps from 0; a checkpoint's step is how many are done
        if after in steps:
            losses[after] = row["loss"]
        for name in MAIN:
            if f"val_{name}" in row:
                measured, scores[after] = name, row[f"val_{name}"]
            if f"knn_{name}" in row:
                measured, scores[row["knn_step"]] = name, row[f"knn_{name}"]
    return losses, measured, scores


def written_at(store: Store, one: Checkpoint) -> float | None:
    """Return when a checkpoint was completed, or its last file written (seconds since 1970). None if a training run has
    removed it in the meantime."""
    from trainer.run.checkpoint import MARKER

    markers = [name for name in one.files if name.endswith(MARKER)]
    try:
        return max(map(store.modified, markers or one.files))
    except FileNotFoundError:
        return None


def format_size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def print_removable(found: list[Checkpoint]) -> None:
    removable = [one for one in found if one.kept is None]
    if not removable:
        console.print(NOTHING_TO_REMOVE)
        return
    steps = ", ".join(f"{one.step:,}" for one in removable)
    size = format_size(sum(one.bytes for one in removable))
    console.print(
        f"{plural(len(removable), 'checkpoint')} to remove, {size}: {'step' if len(removable) == 1 else 'steps'} {steps}. "
        "Add --yes to remove"
    )


def remove(store: Store, removable: list[Checkpoint], owner: str) -> None:
    """Remove checkpoints one by one.

    Args:
        owner: holder of the run's lease. UserError as soon as another process has taken the run over.
    """
    from trainer.run.checkpoint import remove_checkpoints
    from trainer.run.run import check_owner

    with progress_counter("checkpoints", len(removable)) as advance:
        for one in removable:
            check_owner(store, owner)
            remove_checkpoints(store, [one.step])
            advance(1)
    if not removable:
        console.print(NOTHING_TO_REMOVE)
        return
    size = format_size(sum(one.bytes for one in removable))
    console.print(f"removed {plural(len(removable), 'checkpoint')}, {size}")
