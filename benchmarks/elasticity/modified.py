"""The command `maestream` with changes that it has no options for, for comparison in benchmarks.elasticity.

    python -m benchmarks.elasticity.modified [--restart] [--compile-s SECONDS] pretrain …

Ray's controller and workers get what is defined here by value, because this module is `__main__`.
"""

import functools
import sys
from typing import Any

import click
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group import Worker

import trainer.train.pretrain
from benchmarks.elasticity.compiling import compile_first
from cluster.cli.main import main as maestream
from cluster.elastic import driver, scaling
from cluster.elastic.worker_process import ask, run_worker
from trainer.group.requests import Request


class RestartAll(scaling.AvailableCapacityPolicy):
    """Ray restarts all workers when one is lost or has to leave, and adds none while they train."""

    def after_controller_start(self, train_run_context: Any) -> None:
        super().after_controller_start(train_run_context)
        unchanged = {
            "_repair": lambda group, statuses, roster: statuses,
            "_grow": lambda group, roster: None,
        }
        TrainController.worker_group_cls = type("WorkerGroup", (TrainController.worker_group_cls,), unchanged)

    def _ask_to_leave(self, workers: list[Worker]) -> None:
        if self.is_stopping() or scaling._draining_nodes() & self.in_use.keys():
            self.stopping = True
            for worker in workers:
                worker.execute_async(ask, Request.SAVE)


def run_worker_that_compiles(seconds: float, job: dict[str, Any]) -> None:
    task = trainer.train.pretrain
    wrap = task.wrap_for_training
    task.wrap_for_training = lambda *args: compile_first(wrap(*args), seconds)
    run_worker(job)


@click.command(
    help=(__doc__ or "").split("\n")[0],
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--restart", is_flag=True, help="Restart all workers when one is lost or has to leave.")
@click.option("--compile-s", default=0.0, help="Seconds for which each worker process simulates compiling.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(restart: bool, compile_s: float, arguments: tuple[str, ...]) -> None:
    if restart:
        scaling.AvailableCapacityPolicy = RestartAll
    if compile_s:
        driver.run_worker = functools.partial(run_worker_that_compiles, compile_s)
    sys.argv = ["maestream", *arguments]
    maestream()


if __name__ == "__main__":
    main()
