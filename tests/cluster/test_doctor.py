"""`maestream doctor`: its lines are true, and its exit code says whether something has to be mended."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import maestream

from cluster import doctor
from pipeline.storage import open_store


def test_this_machine(s3: str) -> None:
    done = maestream("doctor", "--store", f"{s3}/doctor", check=False)
    lines = done.stdout.splitlines()
    told = {line[2:].partition(":")[0] for line in lines if not line.startswith(" ")}
    assert told >= {
        "packages",
        "GPU",
        "decoding on the CPU",
        "DALI",
        "storage",
        "Ray",
        "shared memory",
        "disk",
    }
    assert f"torch {torch.__version__}" in done.stdout
    assert f"✓ storage: {s3}/doctor: written, read, read in part, removed" in lines
    assert open_store(f"{s3}/doctor").names() == []
    assert "✓ DALI: 2." in done.stdout
    assert ("· GPU: none, so training is on the CPU" in lines) == (not torch.cuda.is_available())
    assert done.returncode == any(line.startswith("✗") for line in lines)
    assert "to be mended" in done.stdout or done.returncode == 0


def test_a_broken_key_and_a_tiny_shared_memory_are_told(s3: str) -> None:
    """In a mount namespace of its own, whose /dev/shm is as small as Docker's."""
    tiny = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tiny /dev/shm && exec "$@"', "sh"]
    if os.getuid() or subprocess.run([*tiny, "true"], check=False).returncode:
        pytest.skip("no mount namespaces here")
    program = Path(sys.executable).with_name("maestream")
    done = subprocess.run(
        [*tiny, program, "doctor", "--store", f"{s3}/doctor", "--address", "127.0.0.1:1"],
        env={**os.environ, "AWS_SECRET_ACCESS_KEY": "wrong"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "✗ shared memory: /dev/shm has 0.1 GB free" in done.stdout
    assert "docker run --shm-size=8g" in done.stdout
    assert f"✗ storage: {s3}/doctor cannot be written" in done.stdout
    assert "access refused" in done.stdout
    assert "✗ Ray: RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there" in done.stdout
    assert "wrong" not in done.stdout


@pytest.mark.parametrize("readable", [True, False])
def test_what_cannot_be_removed_is_told_unless_something_else_is_wrong(
    readable: bool, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> bytes:
        raise PermissionError("denied")

    store = open_store(f"{s3}/undeletable")
    monkeypatch.setattr(store.fs, "rm_file", denied)
    if not readable:
        monkeypatch.setattr(store.fs, "cat_file", denied)
    (finding,) = doctor.storage(store.url)
    assert finding.state == "bad"
    what, right = ("removed", "delete") if readable else ("read", "get")
    assert finding.says.startswith(f"{store.url} cannot be {what}: ")
    assert "denied" in finding.says
    assert finding.mend == f"the key needs the right to {right} objects"


def test_a_gpu_that_torch_does_not_see_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own program that says so is a stand-in: there is no such GPU here."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 570.12\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = doctor.gpu()
    assert finding.state == "bad"
    assert "driver 570.12" in finding.says
    assert "--gpus all" in finding.mend


def test_a_folder_without_room_is_told(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e9
    assert doctor.room(str(tmp_path), free + 1000, "a run", "make room").state == "bad"
    assert doctor.room(str(tmp_path), 0, "a run", "make room").state == "ok"
    assert doctor.room(str(tmp_path / "none"), 1, "a run", "make room").state == "note"
