"""Continue a run with a dataset that has grown since it began (`data.grow`), see `trainer.phases`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from pipeline.loading.loader import Loader, TrainBatch
from pipeline.storage.store import Store
from pipeline.views.prefix import find_prefix, first_shards
from trainer.config.schema import RunConfig
from trainer.phases import Phase, total_steps, with_growth
from trainer.run.run import RunRecord, make_order, read_record


def dataset_of_run(store: Store, config: RunConfig, dataset: Dataset) -> Dataset:
    """The dataset that a run trains on: without `data.grow`, what it was before it was extended.

    So a run is not disturbed if its dataset is extended meanwhile.
    """
    record = read_record(store)
    if config.data.grow or dataset.fingerprint == record.newest_fingerprint:
        return dataset
    return _before(dataset, record.newest_fingerprint)


def grown_record(record: RunRecord, config: RunConfig, dataset: Dataset, step: int) -> RunRecord:
    """The record of a run that has done `step` steps and continues with `dataset`."""
    if dataset.fingerprint == record.newest_fingerprint:
        return record
    phases = phases_of(record, config, dataset)
    new = phase_of(config, dataset)
    grown = with_growth(
        phases, step, config.epochs, new.fingerprint, new.samples, new.shards, new.steps_per_epoch
    )
    return record if grown == phases else replace(record, phases=grown)


def phases_of(record: RunRecord, config: RunConfig, dataset: Dataset) -> list[Phase]:
    """The phases of a run. `dataset` is what the run trains on, or has grown to when there was no epoch left for it."""
    if record.phases:
        return record.phases
    same = dataset.fingerprint == record.fingerprint
    return [phase_of(config, dataset if same else _before(dataset, record.fingerprint))]


def phase_of(config: RunConfig, dataset: Dataset) -> Phase:
    """The phase of a run that trains on this dataset from the beginning."""
    steps = make_order(config, dataset).steps_per_epoch
    return Phase(dataset.fingerprint, dataset.samples, dataset.manifest.shards, 0, 0, steps)


def dataset_of_phase(phase: Phase, dataset: Dataset) -> Dataset:
    """The dataset of a phase, of which `dataset` is the newest state."""
    if phase.fingerprint == dataset.fingerprint:
        return dataset
    return first_shards(dataset, phase.shards, phase.fingerprint)


def _before(dataset: Dataset, fingerprint: str) -> Dataset:
    shards = find_prefix(dataset, fingerprint)
    if shards is None:
        raise UserError(
            f"{dataset.store.url} (fingerprint {dataset.fingerprint[:12]}) is not the dataset of this run ({fingerprint[:12]}), nor "
            "an extension of it"
        )
    return first_shards(dataset, shards, fingerprint)


@dataclass(frozen=True)
class Stretch:
    """Steps `begin` to `stop` − 1, which train on one state of the dataset."""

    begin: int
    stop: int
    shift: int  # see `Phase.shift`
    steps_per_epoch: int
    loader: Loader


def make_stretches(
    config: RunConfig,
    dataset: Dataset,
    phases: Sequence[Phase],
    start: int,
    make_loader: Callable[[Dataset], Loader],
) -> list[Stretch]:
    """The stretches from step `start` on; the last one also if the run is finished."""
    stops = [*(phase.first_step for phase in phases[1:]), total_steps(phases, config.epochs)]
    stretches = []
    for phase, stop in zip(phases, stops, strict=True):
        if stop <= start and phase != phases[-1]:
            continue
        part = dataset_of_phase(phase, dataset)
        steps = make_order(config, part).steps_per_epoch
        begin = max(start, phase.first_step)
        stretches.append(Stretch(begin, stop, phase.shift, steps, make_loader(part)))
    return stretches


def stretches_from(stretches: Sequence[Stretch], step: int) -> list[Stretch]:
    """The stretches from step `step` on; the last one also if the run is finished."""
    left = [stretch for stretch in stretches if stretch.stop > step] or [stretches[-1]]
    return [replace(stretch, begin=step if stretch is left[0] else stretch.begin) for stretch in left]


def batches_of(stretches: Sequence[Stretch]) -> Iterator[tuple[Stretch, TrainBatch]]:
    """The batches of all steps, each with its stretch. Nearly always there is only one stretch."""
    for stretch in stretches:
        shift = stretch.shift
        for batch in stretch.loader.steps(stretch.begin + shift, stretch.stop + shift):
            yield stretch, batch if shift == 0 else replace(batch, step=batch.step - shift)
