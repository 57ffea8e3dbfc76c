"""Samples whose bytes or pixels are bad: they train nothing, are counted over all ranks, and must stay few.

RUN/bad-samples.json holds each of them once, so that the cap counts distinct samples over all attempts.
"""

import json

import torch
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.loader import CHANGED, TrainBatch
from pipeline.manifest import Dataset
from trainer.config import DataConfig
from trainer.run import Run

BAD_SAMPLES = "bad-samples.json"
UNDECODABLE = "it does not decode (the log says more)"


class BadSamples:
    """The bad samples of a run. The same calls on every rank."""

    def __init__(self, run: Run, dataset: Dataset, config: DataConfig) -> None:
        self.run = run
        self.dataset = dataset
        self.most = max(config.bad_samples, int(config.bad_share * dataset.samples))
        self.seen: list[
            tuple[int, bool]
        ] = []  # of this rank since the last look: sample id, whether it changed
        self.known: dict[int, dict[str, object]] = _read(run) if run.rank == 0 else {}

    def see(self, batch: TrainBatch) -> None:
        """Take note of a batch's bad samples."""
        self.seen += [(int(batch.sample_ids[i]), reason == CHANGED) for i, reason in batch.bad.items()]

    def look(self) -> None:
        """Share what was seen. UserError on all ranks if there are more bad samples than the cap allows."""
        everyone = _gather(self.seen, self.run)
        self.seen = []
        new = {sample: changed for sample, changed in everyone if sample not in self.known}
        if new and self.run.rank == 0:
            self.known |= {sample: self._describe(sample, changed) for sample, changed in new.items()}
            text = json.dumps(list(self.known.values()), indent=1) + "\n"
            self.run.store.write(BAD_SAMPLES, text.encode())
        count = torch.tensor(len(self.known), device=self.run.device)
        if self.run.world_size > 1:
            dist.broadcast(count, src=0)
        if int(count) > self.most:
            raise UserError(
                f"{int(count)} bad samples, more than the {self.most} that are allowed: "
                f"{self.run.store.describe(BAD_SAMPLES)} names them. Mend the dataset (`maestream shards verify "
                f"{self.dataset.store.url}`), or raise data.bad_samples or data.bad_share; then run it again"
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


def _read(run: Run) -> dict[int, dict[str, object]]:
    try:
        return {int(row["sample"]): row for row in json.loads(run.store.read(BAD_SAMPLES))}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run.store.describe(BAD_SAMPLES)} is damaged ({error}): remove it, the count begins anew then"
        ) from None


def _gather(seen: list[tuple[int, bool]], run: Run) -> list[tuple[int, bool]]:
    """What all ranks have seen."""
    if run.world_size == 1:
        return seen
    most = torch.tensor(len(seen), device=run.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    rows = torch.full((int(most), 2), -1, dtype=torch.int64, device=run.device)
    if seen:
        rows[: len(seen)] = torch.tensor(seen, dtype=torch.int64)
    parts = [torch.empty_like(rows) for _ in range(run.world_size)]
    dist.all_gather(parts, rows)
    return [(int(sample), bool(changed)) for sample, changed in torch.cat(parts).tolist() if sample >= 0]
