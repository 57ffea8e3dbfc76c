"""The batches of a run, through all states of its dataset (`trainer.run.phases`). Nearly always there is only one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.dataset.dataset import Dataset
from pipeline.loading.loader import Loader, TrainBatch
from trainer.config.schema import RunConfig
from trainer.run.growth import dataset_of_phase
from trainer.run.phases import Phase, total_steps
from trainer.run.run import make_order
from trainer.train.due import Schedule, make_schedule


@dataclass(frozen=True)
class Stretch:
    """Steps `begin` to `stop` − 1, which train on one state of the dataset."""

    begin: int
    stop: int
    shift: int  # see `Phase.shift`
    schedule: Schedule  # counts steps as the order does
    steps_per_epoch: int
    loader: Loader


def make_stretches(
    config: RunConfig,
    dataset: Dataset,
    phases: Sequence[Phase],
    start: int,
    evaluate_every: float | None,
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
        schedule = make_schedule(config, steps, evaluate_every)
        begin = max(start, phase.first_step)
        stretches.append(Stretch(begin, stop, phase.shift, schedule, steps, make_loader(part)))
    return stretches


def batches_of(stretches: Sequence[Stretch]) -> Iterator[tuple[Stretch, TrainBatch]]:
    """The batches of all steps, each with its stretch."""
    for stretch in stretches:
        shift = stretch.shift
        for batch in stretch.loader.steps(stretch.begin + shift, stretch.stop + shift):
            yield stretch, batch if shift == 0 else replace(batch, step=batch.step - shift)
