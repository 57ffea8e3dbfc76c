"""A run continues with a dataset that has grown: from its next epoch on, and its record says so."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from pipeline.views.extend import extend_dataset
from tests.support.datasets import build_dataset
from tests.support.training.small_runs import SMALL, config_of, request_after, weights
from trainer.group.requests import Request
from trainer.growth import dataset_of_run
from trainer.phases import Phase, total_steps, with_growth
from trainer.run.metrics import read_metrics
from trainer.run.run import create_run, open_run, read_record
from trainer.run.worker import Callbacks, Worker
from trainer.train.pretrain import pretrain


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=4))
def test_phases_begin_with_the_next_epoch_and_what_is_done_stays(
    steps: int, growths: list[tuple[int, int]]
) -> None:
    phases, epochs = [Phase("0", 10, 1, 0, 0, steps)], 20.0
    for nth, (step, larger) in enumerate(growths):
        step = min(step, total_steps(phases, epochs))
        before = phases
        phases = with_growth(before, step, epochs, str(nth + 1), 10, 1, phases[-1].steps_per_epoch + larger)
        for a, b in pairwise(phases):
            assert b.first_step - a.first_step == (b.first_epoch - a.first_epoch) * a.steps_per_epoch > 0
        if phases != before:
            new, past = phases[-1], [p for p in before if p.first_step < step or p is before[0]]
            assert new.first_step >= step
            assert new.first_step - step < past[-1].steps_per_epoch
            assert [p for p in phases[:-1] if p not in before] == []
        assert total_steps(phases, epochs) == phases[-1].first_step + round(
            (epochs - phases[-1].first_epoch) * phases[-1].steps_per_epoch
        )


def run_until(dataset: Dataset, out: Path, steps: int | None, grow: bool = True) -> None:
    """Train until `steps` steps of this attempt are done, or to the end."""
    config, run = open_run(str(out), config_of(data={**SMALL["data"], "grow": grow}, log_every=3), dataset)
    create_run(config, run, dataset)
    callbacks = Callbacks(request_after(steps, Request.SAVE)) if steps else Callbacks()
    pretrain(config, dataset_of_run(run.store, config, dataset), run, Worker(ledger=True), callbacks)


def ledger(out: Path) -> dict[int, list[tuple[int, list[int]]]]:
    """The steps of each epoch, with their sample ids."""
    found: dict[int, list[tuple[int, list[int]]]] = {}
    for row in read_metrics(open_store(str(out))):
        found.setdefault(row["epoch"], []).append((row["step"], row["sample_ids"]))
    return found


@pytest.mark.integration
def test_the_ledger_of_a_run_whose_dataset_grows(tmp_path: Path) -> None:
    data = build_dataset("synthetic:?count=24&seed=1", str(tmp_path / "data"))
    more = build_dataset("synthetic:?count=12&seed=2", str(tmp_path / "more"))
    out = tmp_path / "run"
    run_until(data, out, 5)  # epochs of 2 steps: stops in the middle of epoch 2
    (tmp_path / "scratch").mkdir()
    extend_dataset(data.store.url, [more.store.url], tmp_path / "scratch")
    grown = open_dataset(data.store.url)

    with pytest.raises(UserError, match=r"was extended to 36 samples since .* began: add data\.grow=true"):
        open_run(str(out), config_of(), grown)
    # An attempt of the command that was running then continues with what the dataset was.
    assert dataset_of_run(open_store(str(out)), config_of(), grown).fingerprint == data.fingerprint

    shutil.copytree(out, tmp_path / "at-once")
    run_until(grown, tmp_path / "at-once", None)
    run_until(grown, out, 4)  # stops at step 9, in the middle of epoch 4
    run_until(grown, out, None, grow=False)  # no longer needed: the record has it

    epochs = ledger(out)
    assert epochs == ledger(tmp_path / "at-once")
    assert [len(steps) for steps in epochs.values()] == [2, 2, 2, 3, 3, 3]
    assert [step for steps in epochs.values() for step, _ in steps] == list(range(15))
    for epoch, steps in epochs.items():
        ids = np.concatenate([ids for _, ids in steps])
        assert sorted(ids) == list(range(24 if epoch < 3 else 36))
    ours, theirs = weights(out), weights(tmp_path / "at-once")
    assert all(ours[name].equal(theirs[name]) for name in ours)
    record = read_record(open_store(str(out)))
    assert [(p.samples, p.first_epoch, p.first_step, p.steps_per_epoch) for p in record.phases] == [
        (24, 0, 0, 2),
        (36, 3, 6, 3),
    ]
    assert [phase.fingerprint for phase in record.phases] == [data.fingerprint, grown.fingerprint]
    assert record.total_steps(6.0) == 15
    assert [record.epochs_done(step) for step in (4, 6, 9, 15)] == [2, 3, 4, 6]

    other = build_dataset("synthetic:?count=36&seed=9", str(tmp_path / "other"))
    with pytest.raises(UserError, match="was started with another dataset"):
        open_run(str(out), config_of(), other)


@pytest.mark.integration
def test_without_an_epoch_left_a_run_ends_with_what_the_dataset_was(tmp_path: Path) -> None:
    data = build_dataset("synthetic:?count=24&seed=1", str(tmp_path / "data"))
    more = build_dataset("synthetic:?count=12&seed=2", str(tmp_path / "more"))
    run_until(data, tmp_path / "run", 11)  # of 12 steps
    (tmp_path / "scratch").mkdir()
    extend_dataset(data.store.url, [more.store.url], tmp_path / "scratch")
    run_until(open_dataset(data.store.url), tmp_path / "run", None)
    assert [len(steps) for steps in ledger(tmp_path / "run").values()] == [2] * 6
    assert read_record(open_store(str(tmp_path / "run"))).phases == []
