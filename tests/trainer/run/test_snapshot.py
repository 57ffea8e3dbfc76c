"""Snapshots: a run resumes from the newest one that any machine still has, if it is intact and in the history."""

import hashlib
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.storage.store import open_store
from tests.support.training.gloo import gloo_group, run_workers
from tests.support.training.small_runs import config_of
from trainer.config.schema import PretrainConfig
from trainer.run import snapshot as module
from trainer.run.run import RUN, Run, begin_attempt
from trainer.run.snapshot import STATE, Snapshots, node_number, read_tags, restore
from trainer.run.worker import Worker

pytestmark = pytest.mark.integration

ROWS = [{"step": 4, "attempt": 1, "loss": 0.5}]


def make_state(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make a model and its optimizer, after one step."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    tensors = [*model.state_dict().values()]
    tensors += [t for p in model.parameters() for _, t in sorted(optimizer.state[p].items())]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def make_run(folder: Path) -> Run:
    run = Run(open_store(str(folder / "run")), "a-run", 0)
    if not run.store.exists(RUN):
        run.store.write(RUN, b'{"run_id": "a-run", "fingerprint": "f", "starts": []}')
    return run


def config_in(folder: Path, **changes: Any) -> PretrainConfig:
    return config_of(checkpoint={"snapshots": str(folder)}, **changes)


def begin_snapshots(run: Run, folder: Path, worker: Worker | None = None, start: int = 0) -> Snapshots:
    """The snapshots of a worker that is alone."""
    worker = worker or Worker()
    snapshots = Snapshots(worker, config_in(folder))
    snapshots.begin(run, [node_number(worker.node)], start)
    return snapshots


def write_snapshot(folder: Path, step: int, seed: int, start: int = 0, node: str = "local") -> str:
    """Take a snapshot after `step` steps, as a worker does that is then killed. Returns the digest of its state."""
    worker = Worker(node=node)
    run = begin_attempt(make_run(folder), worker, start)
    snapshots = begin_snapshots(run, folder, worker, start)
    state = make_state(seed)
    assert snapshots.due(step)
    snapshots.take(step, *state, ROWS)
    assert snapshots.thread is not None
    snapshots.thread.join()
    return digest(*state)


def restored(folder: Path, checkpoint: int = 0, **changes: Any) -> tuple[int, str] | None:
    """Restore in a new worker. Returns the step and the digest of the restored state, None if there is no snapshot."""
    state = make_state(99)
    got = restore(
        make_run(folder), Worker(), config_in(folder, **changes), [node_number("local")], checkpoint, *state
    )
    if got is None:
        assert digest(*state) == digest(*make_state(99))  # nothing was restored
        return None
    assert got[1] == ROWS
    return got[0], digest(*state)


def snapshot_file(folder: Path, node: str = "local") -> Path:
    return folder / "maestream-a-run" / node / STATE


def test_the_newest_snapshot_is_restored(tmp_path: Path) -> None:
    assert restored(tmp_path) is None
    written = write_snapshot(tmp_path, 5, seed=1)
    assert restored(tmp_path) == (5, written)
    written = write_snapshot(tmp_path, 9, seed=2, start=5)
    assert restored(tmp_path) == (9, written)
    assert restored(tmp_path, checkpoint=9) is None
    assert restored(tmp_path, checkpoint=8) == (9, written)
    assert [path.name for path in snapshot_file(tmp_path).parent.iterdir()] == [STATE]


def test_older_snapshots_of_other_nodes_are_removed(tmp_path: Path) -> None:
    write_snapshot(tmp_path, 5, seed=1, node="first")
    write_snapshot(tmp_path, 9, seed=2, start=5, node="second")
    assert [path.name for path in (tmp_path / "maestream-a-run").iterdir()] == ["second"]


def test_snapshots_of_this_attempts_other_nodes_are_kept(tmp_path: Path) -> None:
    """They are about to write a newer snapshot; removing their folder would make that fail."""
    write_snapshot(tmp_path, 5, seed=1, node="first")
    worker = Worker(node="second")
    run = begin_attempt(make_run(tmp_path), worker, 5)
    snapshots = Snapshots(worker, config_in(tmp_path))
    snapshots.begin(run, [node_number("second"), node_number("first")], 5)
    assert snapshots.take_and_wait(9, *make_state(2), ROWS)
    assert {path.name for path in (tmp_path / "maestream-a-run").iterdir()} == {"first", "second"}


def test_a_snapshot_outside_the_history_is_ignored(tmp_path: Path) -> None:
    write_snapshot(tmp_path, 7, seed=1)
    begin_attempt(make_run(tmp_path), Worker(), 3)  # began before step 7, and wrote no snapshot
    assert restored(tmp_path) is None


def test_a_snapshot_of_another_config_is_ignored(tmp_path: Path) -> None:
    write_snapshot(tmp_path, 5, seed=1)
    assert restored(tmp_path, seed=7) is None
    assert restored(tmp_path, micro_batch=3) is not None  # micro_batch may change when a run resumes


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "not finite", "other run"])
def test_damaged_snapshots_and_those_of_other_runs_are_ignored(tmp_path: Path, damage: str) -> None:
    write_snapshot(tmp_path, 5, seed=1)
    path = snapshot_file(tmp_path)
    data, tags, state = bytearray(path.read_bytes()), read_tags(path), load_file(path)
    assert tags is not None
    if damage == "flip":
        data[-3] ^= 4
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-8])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "not finite":
        state = {name: tensor.clone() for name, tensor in state.items()}
        state["model/weight"][0, 0] = torch.nan
        save_file(state, path, tags | {"crc32c": str(module.state_checksum(state))})
    else:
        save_file(state, path, tags | {"run_id": "another"})
    assert restored(tmp_path) is None


def test_take_and_wait(tmp_path: Path) -> None:
    run = begin_attempt(make_run(tmp_path), Worker(), 0)
    snapshots = begin_snapshots(run, tmp_path)
    state = make_state(1)
    snapshots.take(1, *make_state(2), [])
    assert snapshots.take_and_wait(2, *state, ROWS)
    assert restored(tmp_path) == (2, digest(*state))
    assert not begin_snapshots(run, tmp_path / "nowhere").take_and_wait(3, *state, ROWS)


def test_close_removes_the_snapshot(tmp_path: Path) -> None:
    run = begin_attempt(make_run(tmp_path), Worker(), 0)
    snapshots = begin_snapshots(run, tmp_path)
    snapshots.take(1, *make_state(1), ROWS)
    snapshots.close()
    assert not (tmp_path / "maestream-a-run").exists()


def test_a_full_folder_gives_one_warning_and_training_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], check=False).returncode:
        pytest.skip("may not mount here")
    try:
        run = begin_attempt(make_run(tmp_path), Worker(), 0)
        snapshots = begin_snapshots(run, small)
        model = nn.Linear(200, 200)
        with caplog.at_level(logging.WARNING, "maestream"):
            for step in (1, 2000):
                snapshots.take(step, model, torch.optim.AdamW(model.parameters()), [])
            snapshots.close()
        assert caplog.text.count("no more snapshots in") == 1
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def _restore_worker(rank: int, world_size: int, folder: str, expected: str) -> None:
    """Restore where rank 1 has the newest snapshot on its machine, rank 2 an older one and rank 0 none."""
    base = Path(folder)
    with gloo_group(f"{folder}/meet", rank, world_size) as group:
        state = make_state(90 + rank)
        config = config_in(base / f"machine-{rank}")
        worker = Worker(group, f"machine-{rank}")
        nodes = [node_number(f"machine-{other}") for other in range(world_size)]
        got = restore(make_run(base), worker, config, nodes, 2, *state)
        assert got == (9, ROWS)
        assert digest(*state) == expected


def test_one_surviving_node_restores_all(tmp_path: Path) -> None:
    make_run(tmp_path)
    older = write_snapshot(tmp_path, 5, seed=1)
    for machine in (1, 2):
        target = snapshot_file(tmp_path / f"machine-{machine}")
        target.parent.mkdir(parents=True)
        target.write_bytes(snapshot_file(tmp_path).read_bytes())
    newest = write_snapshot(tmp_path, 9, seed=2, start=5)
    assert newest != older
    snapshot_file(tmp_path / "machine-1").write_bytes(snapshot_file(tmp_path).read_bytes())
    run_workers(_restore_worker, 3, str(tmp_path), newest)
