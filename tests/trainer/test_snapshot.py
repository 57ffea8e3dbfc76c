"""Hot snapshots: the newest state that any machine still has, and nothing else, is gone on from."""

import hashlib
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import gloo_group, run_workers
from safetensors.torch import load_file, save_file
from test_pretrain import config_of
from torch import nn

from pipeline.storage import open_store
from trainer import snapshot as module
from trainer.config import PretrainConfig
from trainer.run import RUN, Run, begin_attempt
from trainer.snapshot import STATE, Snapshots, _number, _tags, restore

ROWS = [{"step": 4, "attempt": 1, "loss": 0.5}]


def make_state(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after a step."""
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


def make_run(folder: Path, **changes: Any) -> Run:
    run = Run(open_store(str(folder / "run")), "a-run", 0, **changes)
    if run.rank == 0 and not run.store.exists(RUN):
        run.store.write(RUN, b'{"run_id": "a-run", "fingerprint": "f", "starts": []}')
    return run


def config_in(folder: Path, **changes: Any) -> PretrainConfig:
    return config_of(checkpoint={"snapshots": str(folder)}, **changes)


def leave(folder: Path, step: int, seed: int, start: int = 0, **changes: Any) -> str:
    """What a worker leaves that takes a snapshot after `step` steps and is killed. Returns its state's digest."""
    run = begin_attempt(make_run(folder, **changes), start)
    snapshots = Snapshots(run, config_in(folder), start)
    state = make_state(seed)
    assert snapshots.due(step)
    snapshots.take(step, *state, ROWS, 0)
    assert snapshots.thread is not None
    snapshots.thread.join()
    return digest(*state)


def found(folder: Path, commit: int = 0, **changes: Any) -> tuple[int, str] | None:
    """What a new worker goes on from, and the digest of its state then."""
    state = make_state(99)
    got = restore(make_run(folder), config_in(folder, **changes), commit, *state)
    if got is None:
        assert digest(*state) == digest(*make_state(99))  # it was not touched
        return None
    assert got[1] == ROWS
    return got[0], digest(*state)


def the_file(folder: Path, node: str = "local") -> Path:
    return folder / "maestream-a-run" / node / STATE


def test_the_newest_state_is_gone_on_from(tmp_path: Path) -> None:
    assert found(tmp_path) is None
    left = leave(tmp_path, 5, seed=1)
    assert found(tmp_path) == (5, left)
    left = leave(tmp_path, 9, seed=2, start=5)
    assert found(tmp_path) == (9, left)
    assert found(tmp_path, commit=9) is None
    assert found(tmp_path, commit=8) == (9, left)
    assert [path.name for path in the_file(tmp_path).parent.iterdir()] == [STATE]


def test_older_ones_of_other_nodes_are_cleared_away(tmp_path: Path) -> None:
    leave(tmp_path, 5, seed=1, node="first")
    leave(tmp_path, 9, seed=2, start=5, node="second")
    assert [path.name for path in (tmp_path / "maestream-a-run").iterdir()] == ["second"]


def test_those_of_the_same_attempts_nodes_are_left_alone(tmp_path: Path) -> None:
    """They are about to leave another in its place: to take the folder away meanwhile would end that."""
    leave(tmp_path, 5, seed=1, node="first")
    snapshots = Snapshots(begin_attempt(make_run(tmp_path, node="second"), 5), config_in(tmp_path), 5)
    snapshots.nodes.add(_number("first"))
    assert snapshots.keep(9, *make_state(2), ROWS)
    assert {path.name for path in (tmp_path / "maestream-a-run").iterdir()} == {"first", "second"}


def test_what_is_not_in_the_history_is_ignored(tmp_path: Path) -> None:
    leave(tmp_path, 7, seed=1)
    begin_attempt(make_run(tmp_path), 3)  # it began before that, and left nothing
    assert found(tmp_path) is None


def test_of_another_config_it_is_ignored(tmp_path: Path) -> None:
    leave(tmp_path, 5, seed=1)
    assert found(tmp_path, seed=7) is None
    assert found(tmp_path, micro_batch=3) is not None  # this one may differ


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "not finite", "other run"])
def test_torn_or_strange_ones_are_ignored(tmp_path: Path, harm: str) -> None:
    leave(tmp_path, 5, seed=1)
    path = the_file(tmp_path)
    data, tags, state = bytearray(path.read_bytes()), _tags(path), load_file(path)
    assert tags is not None
    if harm == "flip":
        data[-3] ^= 4
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(data[:-8])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "not finite":
        state = {name: tensor.clone() for name, tensor in state.items()}
        state["model/weight"][0, 0] = torch.nan
        save_file(state, path, tags | {"crc32c": str(module._checksum(state))})
    else:
        save_file(state, path, tags | {"run_id": "another"})
    assert found(tmp_path) is None


def test_kept_at_once(tmp_path: Path) -> None:
    run = begin_attempt(make_run(tmp_path), 0)
    snapshots = Snapshots(run, config_in(tmp_path), 0)
    state = make_state(1)
    snapshots.take(1, *make_state(2), [], 0)
    assert snapshots.keep(2, *state, ROWS)
    assert found(tmp_path) == (2, digest(*state))
    assert not Snapshots(run, config_in(tmp_path / "nowhere"), 0).keep(3, *state, ROWS)


def test_a_run_that_ends_leaves_none(tmp_path: Path) -> None:
    run = begin_attempt(make_run(tmp_path), 0)
    snapshots = Snapshots(run, config_in(tmp_path), 0)
    snapshots.take(1, *make_state(1), ROWS, 0)
    snapshots.close()
    assert not (tmp_path / "maestream-a-run").exists()


def test_a_full_folder_is_said_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], check=False).returncode:
        pytest.skip("may not mount here")
    try:
        run = begin_attempt(make_run(tmp_path), 0)
        snapshots = Snapshots(run, config_in(small), 0)
        model = nn.Linear(200, 200)
        with caplog.at_level(logging.WARNING, "maestream"):
            for step in (1, 2000):
                snapshots.take(step, model, torch.optim.AdamW(model.parameters()), [], 0)
            snapshots.close()
        assert caplog.text.count("no more snapshots in") == 1
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def _survivor(rank: int, world_size: int, folder: str, expected: str) -> None:
    """Rank 1 has the newest snapshot on its machine, rank 2 an older one, rank 0 none."""
    base = Path(folder)
    with gloo_group(f"{folder}/meet", rank, world_size):
        state = make_state(90 + rank)
        config = config_in(base / f"machine-{rank}")
        run = make_run(base, rank=rank, world_size=world_size, node=f"machine-{rank}")
        got = restore(run, config, 2, *state)
        assert got == (9, ROWS)
        assert digest(*state) == expected


def test_one_survivor_is_enough_for_all(tmp_path: Path) -> None:
    make_run(tmp_path)
    older = leave(tmp_path, 5, seed=1)
    for machine in (1, 2):
        target = the_file(tmp_path / f"machine-{machine}")
        target.parent.mkdir(parents=True)
        target.write_bytes(the_file(tmp_path).read_bytes())
    newest = leave(tmp_path, 9, seed=2, start=5)
    assert newest != older
    the_file(tmp_path / "machine-1").write_bytes(the_file(tmp_path).read_bytes())
    run_workers(_survivor, 3, str(tmp_path), newest)
