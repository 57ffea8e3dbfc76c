"""How a worker forms a group with others at the start, and when one is lost, leaves or joins, see `trainer.train.loop`."""

from dataclasses import dataclass, field

from pipeline.dataset.dataset import Dataset
from trainer.config.schema import RunConfig
from trainer.group.rendezvous import WorkerLost
from trainer.group.requests import Vote
from trainer.growth import Stretch, grown_record, phases_of
from trainer.phases import Phase
from trainer.run.bad_samples import BadSamples
from trainer.run.resume import resume
from trainer.run.run import Run, begin_attempt, read_record
from trainer.run.snapshot import Snapshots, node_number
from trainer.run.worker import Callbacks, Worker
from trainer.train.progress import Progress, Standing, catch_up, exchange
from trainer.train.records import Records, open_records
from trainer.train.task import Task

MAX_REGROUPS = 30
BAD, EVALUATE = 1, 2  # what workers do together after a step: exchange bad samples, evaluate


@dataclass
class Team:
    """A worker's part in the groups that it trains in, and what changes with them."""

    task: Task
    config: RunConfig
    dataset: Dataset
    run: Run  # its attempt is that of the current group
    worker: Worker
    callbacks: Callbacks
    bad_samples: BadSamples
    snapshots: Snapshots
    progress: Progress = field(default_factory=Progress)
    phases: list[Phase] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)  # from the step on at which this worker began
    records: Records | None = None  # on rank 0 only
    regroups: tuple[int, int] = (-1, 0)  # number of steps done, and how often groups were formed then
    vote: Vote = field(init=False)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.progress.step

    def regroup(self, leaving: bool = False, unsettled: int = 0) -> bool:
        """Form a group with the workers that are left and those that join, and come to the same state.

        Args:
            leaving: do not become a member, but let the others go on.
            unsettled: what is left to do together after the last step, see `settle`. The caller does it afterwards.

        Returns False if this worker is not a member: because it leaves, or because the run is finished.
        """
        self._count_regroups()
        while True:
            try:
                if self.worker.group.changes and not self.worker.group.rebuild(leaving):
                    return False
                others = self._begin(unsettled)
                if others and not unsettled:  # they do it again, and need this worker for it
                    self.settle(others)
                return True
            except WorkerLost:
                self._count_regroups()

    def _count_regroups(self) -> None:
        """Raise RuntimeError if groups are lost again and again without a step: then all workers have to start again."""
        step, count = self.regroups
        self.regroups = self.step, count + 1 if step == self.step else 1
        if self.regroups[1] > MAX_REGROUPS:
            raise RuntimeError(f"{MAX_REGROUPS} groups of workers were lost without a step")

    def _begin(self, unsettled: int) -> int:
        """Begin an attempt with a new group. Returns what any worker has left to do after the last step."""
        task, worker, progress = self.task, self.worker, self.progress
        task.optimizer.zero_grad(set_to_none=True)
        standings = exchange(Standing(progress.step, unsettled, node_number(worker.node)), worker)
        nodes = [standing.node for standing in standings]
        if all(standing.step < 0 for standing in standings):
            args = self.run, worker, self.config, nodes, self.dataset.fingerprint, task.model, task.optimizer
            point = resume(*args, task.begin)
            progress.step, progress.unsaved = point.step, point.rows
        else:
            catch_up(progress, standings, task, worker)
        step = progress.step
        self.run = begin_attempt(
            self.run, worker, step, lambda record: grown_record(record, self.config, self.dataset, step)
        )
        self.read_phases()
        if worker.rank == 0:
            self._begin_records(taking_over=any(standing.step >= 0 for standing in standings))
        self.snapshots.begin(self.run, nodes, step)
        self.vote = Vote(worker.group)
        for stretch in self.stretches:
            stretch.loader.change_workers(step + stretch.shift, worker.rank, worker.world_size)
            stretch.loader.skip_to(step + stretch.shift)
        unsettled = 0
        for standing in standings:
            unsettled |= standing.unsettled
        return unsettled

    def read_phases(self) -> list[Phase]:
        """Return the phases of the run, which are read once."""
        self.phases = self.phases or phases_of(read_record(self.run.store), self.config, self.dataset)
        return self.phases

    def _begin_records(self, taking_over: bool) -> None:
        """Do what only rank 0 does, for a new attempt."""
        step = self.progress.step
        if self.records is None:
            self.bad_samples.read()
            self.task.become_main()
            fingerprint = self.phases[-1].fingerprint
            self.records = open_records(
                self.task, self.config, self.run, fingerprint, self.progress, taking_over
            )
        self.records.begin_attempt(self.run)
        self.records.write(self.progress.unsaved)
        self.callbacks.on_attempt(self.run.attempt, step, self.worker.world_size)
        if self.phases[-1].first_step >= step and len(self.phases) > 1:
            grown = {"event": "grown", "step": self.phases[-1].first_step, "samples": self.dataset.samples}
            self.callbacks.on_event(grown)

    def settle(self, unsettled: int) -> dict[str, float]:
        """Do what all workers do together after a step: BAD, EVALUATE, both or 0. Returns the results of the evaluation.

        If a worker is lost meanwhile, all do it again with the next group. So they may not be a step further before.
        """
        while True:
            try:
                if unsettled & BAD:
                    self.bad_samples.check()
                return self.task.evaluate(self.step) if unsettled & EVALUATE else {}
            except WorkerLost:
                self.regroup(unsettled=unsettled)
