"""Kill one of a run's workers, with SIGKILL, when the run has done so many steps:

    python -m tests.support.kill_worker ABOVE RUN STEP

ABOVE is a process above `maestream pretrain`. Ends with it, or with the run, if that comes first.
"""

import os
import signal
import sys
import time

import psutil

from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.processes import processes
from trainer.run.metrics import read_metrics


def main(above: int, run: str, step: int) -> None:
    while psutil.pid_exists(above):
        try:
            rows = read_metrics(open_store(run))
        except (FileNotFoundError, UserError):  # it has not begun
            rows = []
        if len(rows) >= step:
            for worker in processes("RayTrainWorker", above)[:1]:
                print(f"\n$ kill -9 {worker}     # one of its workers, at step {len(rows)}\n", flush=True)
                os.kill(worker, signal.SIGKILL)
            return
        time.sleep(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
