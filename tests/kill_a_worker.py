"""Kill one of a run's workers, with SIGKILL, when the run has done so many steps:

    python tests/kill_a_worker.py ABOVE RUN STEP

ABOVE is a process above `maestream pretrain`. Ends with it, or with the run, if that comes first.
"""

import os
import sys
import time

sys.path[:0] = [os.path.join(os.path.dirname(__file__), "cluster"), os.getcwd()]

from run_control import kill, workers_of  # noqa: E402

from pipeline.errors import UserError  # noqa: E402
from pipeline.storage import open_store  # noqa: E402
from trainer.metrics import read_metrics  # noqa: E402


def main(above: int, run: str, step: int) -> None:
    while os.path.exists(f"/proc/{above}"):
        try:
            rows = read_metrics(open_store(run))
        except (FileNotFoundError, UserError):  # it has not begun
            rows = []
        if len(rows) >= step and (workers := workers_of(above)):
            print(f"\n$ kill -9 {workers[0]}     # one of its workers, at step {len(rows)}\n", flush=True)
            kill(workers[0])
            return
        if len(rows) >= step:
            return
        time.sleep(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
