"""Bad samples: samples whose bytes have changed or that cannot be decoded.

They have weight 0 in the loss. RUN/bad-samples.json lists each once, over all ranks and attempts; above a limit the run
stops.
"""

import json

import torch
import torch.distributed as dist

from pipeline.dataset.dataset import Dataset
from pipeline.errors import UserError
from pipeline.loading.loader import CHANGED, TrainBatch
from pipeline.storage.store import Store
from trainer.config.schema import DataConfig
from trainer.run.run import Run
from trainer.run.worker import Worker

BAD_SAMPLES = "bad-samples.json"
UNDECODABLE = "cannot be decoded (see the log)"


class BadSamples:
    """The bad samples of a run. Every rank makes the same calls."""

    def __init__(self, run: Run, worker: Worker, dataset: Dataset, config: DataConfig) -> None:
        self.store = run.store
        self.worker = worker
        self.dataset = dataset
        self.limit = max(config.bad_samples, int(config.bad_share * dataset.samples))
        # This rank's since the last `check`: sample id, and whether its bytes have changed.
        self.unchecked: list[tuple[int, bool]] = []
        # By sample id, as in RUN/bad-samples.json; used on rank 0 only.
        self.known: dict[int, dict[str, object]] = {}

    def read(self) -> None:
        """Read those of earlier attempts. Call it on a worker that becomes rank 0."""
        self.known = _read(self.store)

    def add(self, batch: TrainBatch) -> None:
        """Add the bad samples of a batch."""
        self.unchecked += [(int(batch.sample_ids[i]), reason == CHANGED) for i, reason in batch.bad.items()]

    def check(self) -> None:
        """Gather the bad samples of all ranks and record new ones. UserError on all ranks if there are more than the limit."""
        everyone = _gather(self.unchecked, self.worker)
        new = {sample: changed for sample, changed in everyone if sample not in self.known}
        if new and self.worker.rank == 0:
            self.known |= {sample: self._describe(sample, changed) for sample, changed in new.items()}
            text = json.dumps(list(self.known.values()), indent=1) + "\n"
            self.store.write(BAD_SAMPLES, text.encode())
        count = torch.tensor(len(self.known))
        self.worker.group.broadcast(count, source=0)
        self.unchecked = []
        if int(count) > self.limit:
            raise UserError(
                f"{int(count)} bad samples, more than the limit of {self.limit}: see {self.store.describe(BAD_SAMPLES)}. "
                f"Repair the dataset (`maestream shards verify {self.dataset.store.url}`), or raise data.bad_samples or "
                "data.bad_share; then run the same command again"
            )

    def _describe(self, sample: int, changed: bool) -> dict[str, object]:
        located = self.dataset.locate([sample])
        return {
            "sample": sample,
            "key": self.dataset.keys([sample])[0],
            "shard": self.dataset.shard_name(int(located.shard[0])),
            "offset": int(located.offset[0]),
            "reason": CHANGED if changed else UNDECODABLE,
        }


def _read(store: Store) -> dict[int, dict[str, object]]:
    try:
        return {int(row["sample"]): row for row in json.loads(store.read(BAD_SAMPLES))}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{store.describe(BAD_SAMPLES)} is damaged ({error}): remove it to restart the count"
        ) from None


def _gather(own: list[tuple[int, bool]], worker: Worker) -> list[tuple[int, bool]]:
    """Return the lists of all ranks, joined."""
    if worker.world_size == 1:
        return own
    longest = torch.tensor(len(own))
    worker.group.all_reduce(longest, dist.ReduceOp.MAX)
    rows = torch.full((int(longest), 2), -1, dtype=torch.int64)
    if own:
        rows[: len(own)] = torch.tensor(own, dtype=torch.int64)
    parts = worker.group.all_gather(rows)
    return [(int(sample), bool(changed)) for sample, changed in torch.cat(parts).tolist() if sample >= 0]
