"""`maestream checkpoints`: what there is of a run to go on from, and which of it a rule keeps."""

from dataclasses import dataclass

import click
from rich import box
from rich.table import Table

from cluster.report import moment, number
from cluster.terminal import console, counting
from pipeline.errors import UserError
from pipeline.storage import Store, open_store

GOES = "goes"


@dataclass(frozen=True)
class Rule:
    """Which commits stay: see trainer.config.CheckpointConfig."""

    keep: int
    every: int | None

    def __str__(self) -> str:
        first = f", and the first of each {self.every:,} steps for good" if self.every else ""
        return f"the newest {self.keep}{first}"


@dataclass(frozen=True)
class Written:
    """A checkpoint, committed or not."""

    step: int
    files: dict[str, int]  # and their bytes
    committed: str  # "taken over": of an attempt that another one began before it
    kept: str  # why it stays; or GOES

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


@click.command()
@click.argument("run")
@click.option("--keep", type=click.IntRange(min=1), help="Newest commits that stay.  [default: as the run]")
@click.option(
    "--keep-every",
    type=click.IntRange(min=0),
    help="Besides, for good, the first commit of each so many steps; 0: none.  [default: as the run]",
)
@click.option("--prune", is_flag=True, help="Say what that leaves out, and how much it is.")
@click.option("--yes", is_flag=True, help="With --prune: remove it.")
def checkpoints(run: str, keep: int | None, keep_every: int | None, prune: bool, yes: bool) -> None:
    """The checkpoints of a run, and which of them stay: those that its config keeps, or a rule given here."""
    from trainer.lease import Lease
    from trainer.run import read_config

    if yes and not prune:
        raise UserError("--yes says that --prune may remove something: give that, too")
    store = open_store(run)
    own = read_config(store).checkpoint
    every = own.keep_every if keep_every is None else keep_every
    rule = Rule(keep or own.keep, every or None)
    if not yes:
        found = find(store, rule)
        show(store, found, rule)
        if prune:
            say_what_goes(found)
        return
    with Lease(store, console.print, lambda: None) as lease:  # nobody trains meanwhile
        remove(store, [one for one in find(store, rule) if one.kept == GOES], lease.owner)


def find(store: Store, rule: Rule) -> list[Written]:
    """All checkpoints of a run, oldest first. UserError if it has not begun."""
    from trainer.checkpoint import FOLDER, committed_steps, descends, kept_steps, step_of
    from trainer.run import read_begun

    starts = read_begun(store).starts
    files: dict[int, dict[str, int]] = {}
    for name, size in store.sizes(FOLDER).items():
        if (step := step_of(name)) is not None:
            files.setdefault(step, {})[name] = size
    ours = {step: descends(store, step, starts) for step in committed_steps(store)}
    history = [step for step, good in ours.items() if good]
    kept = dict.fromkeys(kept_steps(history, rule.keep, rule.every), "for good")
    kept |= dict.fromkeys(history[-rule.keep :], "newest")
    found = []
    for step in sorted(files):
        if step not in ours:
            said = "no", GOES
        elif ours[step] is None:  # who wants to go on from it is told what to do, and has to decide
            said = "damaged", "as it is"
        else:
            said = "yes" if ours[step] else "taken over", kept.get(step, GOES)
        found.append(Written(step, files[step], *said))
    return found


def show(store: Store, found: list[Written], rule: Rule) -> None:
    from trainer.config import PretrainConfig
    from trainer.run import read_begun, read_config

    if not found:
        console.print(f"{store.url} has no checkpoint yet")
        return
    losses, judged = measured(store, {one.step for one in found})
    per_epoch = read_begun(store).steps_per_epoch
    measure = "kNN top-1" if isinstance(read_config(store), PretrainConfig) else "top-1"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in ("step", "epoch", "size", "written (UTC)", "loss", measure):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("committed")
    table.add_column("stays")
    for one in found:
        table.add_row(
            f"{one.step:,}",
            number(per_epoch and one.step / per_epoch, 1),
            size_said(one.bytes),
            "–" if (at := written_at(store, one)) is None else moment(at)[:-3],
            number(losses.get(one.step), 4),
            number(judged.get(one.step), 2),
            one.committed,
            "–" if one.kept == GOES else one.kept,
        )
    console.print(table)
    console.print(f"{size_said(sum(one.bytes for one in found))} in all; what stays is {rule}")


def measured(store: Store, steps: set[int]) -> tuple[dict[int, float], dict[int, float]]:
    """Losses, and top-1 in percent, of the model as it was after so many steps."""
    from trainer.metrics import history

    losses, judged = {}, {}
    for row in history(store):  # a step that was done again comes again
        after = row["step"] + 1
        if after in steps:
            losses[after] = row["loss"]
        if "val_top1" in row:
            judged[after] = row["val_top1"]
        if "knn_top1" in row:
            judged[row["knn_step"]] = row["knn_top1"]
    return losses, judged


def written_at(store: Store, one: Written) -> float | None:
    """When it was committed, or what there is of it was written last. None: a run that goes on has just removed it."""
    from trainer.checkpoint import MARKER

    markers = [name for name in one.files if name.endswith(MARKER)]
    try:
        return max(map(store.modified, markers or one.files))
    except FileNotFoundError:
        return None


def size_said(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def say_what_goes(found: list[Written]) -> None:
    going = [one for one in found if one.kept == GOES]
    if not going:
        console.print("there is nothing to remove")
        return
    steps = ", ".join(f"{one.step:,}" for one in going)
    size = size_said(sum(one.bytes for one in going))
    console.print(f"--yes would remove {len(going)} checkpoints, {size}: of step {steps}")


def remove(store: Store, going: list[Written], owner: str) -> None:
    """One after another, as long as the run is ours."""
    from trainer.checkpoint import remove_checkpoints
    from trainer.run import Run, check_owner, read_begun

    known = read_begun(store)
    run = Run(store, known.run_id, len(known.starts), owner=owner)
    with counting("checkpoints", len(going)) as more:
        for one in going:
            check_owner(run)
            remove_checkpoints(store, [one.step])
            more(1)
    size = size_said(sum(one.bytes for one in going))
    console.print(f"{len(going)} checkpoints are removed, {size}" if going else "there is nothing to remove")
