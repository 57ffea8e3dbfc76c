"""A worker that takes every batch of some epochs, and prints what memory it and its fetcher hold on the way.

python -m tests.support.memory_probe JOB        see `Job`; prints a `Look` a line, all as JSON
"""

import contextlib
import gc
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import index_name
from pipeline.decode.factory import make_decoder
from pipeline.loading.fetch_client import Fetcher
from pipeline.loading.loader import Loader
from pipeline.loading.order import Order
from tests.support.processes import processes


@dataclass(frozen=True)
class Job:
    dataset: str
    global_batch: int
    lanes: int
    block: int
    size: int  # pixels
    epochs: int
    cache: tuple[str, int] | None  # folder and size in bytes of the disk cache
    changes: bool = False  # whether the worker becomes one of two and the only one again, every seven steps


@dataclass(frozen=True)
class Look:
    """Bytes at one step."""

    epoch: int
    worker: int  # anonymous and shared memory, beyond what there was before its loader
    fetcher: int  # anonymous memory, beyond what one takes that has nothing to do
    held: int  # in buffers, which are shared memory of both
    kept: int  # of the files in the disk cache
    step: int  # of this step's encoded samples


def memory(pid: int, *kinds: str) -> int:
    """Bytes of a process; pages of files on disk are the system's."""
    lines = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(lines[kind].split()[0]) << 10 for kind in kinds)


def held(fetcher: int) -> int:
    """Bytes of all buffers that the worker maps or the fetcher has. A process's shared memory has only those
    of their pages that it has touched itself, so that alone would say too little."""
    found: dict[int, int] = {}  # inode → bytes
    for process in (os.getpid(), fetcher):
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            if "/memfd:maestream" in line:
                span, _, _, _, inode = line.split()[:5]
                begin, end = (int(address, 16) for address in span.split("-"))
                found[int(inode)] = end - begin
    return sum(found.values())


def kept(folder: str) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                total += os.stat(os.path.join(root, name)).st_size
    return total


def idle_fetcher(dataset: Dataset) -> int:
    fetcher = Fetcher(dataset.shard_store.url, dataset.store.url)
    fetcher.read_file(index_name(dataset.shard_name(0))).result()
    found = memory(fetcher.process.pid, "RssAnon")
    fetcher.close()
    return found


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    dataset = open_dataset(job.dataset)
    order = Order(dataset.shard_samples, 0, job.global_batch, job.lanes, job.block)
    cache = (job.cache[0], job.cache[1]) if job.cache else None
    loader = Loader(dataset, order, make_decoder("cpu", job.size, 2), 0, 1, cache)
    idle = idle_fetcher(dataset)
    gc.collect()
    before, fetcher, last = memory(os.getpid(), "RssAnon", "RssShmem"), 0, -1
    for batch in loader.steps(0, job.epochs * order.steps_per_epoch):
        assert (batch.weights == 1).all()
        if batch.step == last:
            continue  # it is made again
        last = batch.step
        if job.changes and last % 7 == 0:  # from this step or a later one on, which may have been prefetched
            loader.change_workers(last + last // 14 % 5, 0, 1 + last // 7 % 2)
        fetcher = fetcher or next(pid for pid in processes("pipeline.loading.fetch_process", os.getpid()))
        look = Look(
            batch.epoch,
            memory(os.getpid(), "RssAnon", "RssShmem") - before,
            memory(fetcher, "RssAnon") - idle,
            held(fetcher),
            kept(cache[0]) if cache else 0,
            int(dataset.locate(batch.sample_ids.numpy()).size.sum()),
        )
        print(json.dumps(asdict(look)), flush=True)
    loader.close()


if __name__ == "__main__":
    main()
