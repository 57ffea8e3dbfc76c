"""`maestream doctor`: each line is correct, and the exit code says whether there is a problem."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster.cli import doctor
from pipeline.storage.store import open_store
from tests.support.command_line import maestream

pytestmark = pytest.mark.integration


def test_all_checks_on_this_machine(s3: str) -> None:
    done = maestream("doctor", "--store", f"{s3}/doctor", check=False)
    lines = done.stdout.splitlines()
    names = {line[2:].partition(":")[0] for line in lines if not line.startswith(" ")}
    assert names >= {
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
    assert f"✓ storage: {s3}/doctor: writing, reading, reading byte ranges and deleting work" in lines
    assert open_store(f"{s3}/doctor").names() == []
    assert "✓ DALI: 2." in done.stdout
    assert ("· GPU: none, training will run on the CPU" in lines) == (not torch.cuda.is_available())
    assert done.returncode == any(line.startswith("✗") for line in lines)
    assert " to fix" in done.stdout or done.returncode == 0


def test_a_wrong_key_and_too_little_shared_memory_are_reported(s3: str) -> None:
    """In a mount namespace whose /dev/shm is as small as Docker's default."""
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
    assert f"✗ storage: cannot write to {s3}/doctor" in done.stdout
    assert "access denied" in done.stdout
    assert "✗ Ray: RAY_ADDRESS=127.0.0.1:1: no Ray cluster is reachable at this address" in done.stdout
    assert "wrong" not in done.stdout


@pytest.mark.parametrize("readable", [True, False])
def test_only_the_first_storage_error_is_reported(
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
    action, permission = ("delete from", "delete") if readable else ("read from", "get")
    assert finding.text.startswith(f"cannot {action} {store.url}: ")
    assert "denied" in finding.text
    assert finding.fix == f"the key needs permission to {permission} objects"


def test_a_gpu_that_torch_cannot_use_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake nvidia-smi, as there is no such GPU here."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 570.12\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = doctor.gpu()
    assert finding.state == "bad"
    assert "driver 570.12" in finding.text
    assert "--gpus all" in finding.fix


def test_too_little_free_space_is_reported(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e9
    assert doctor.check_free_space(str(tmp_path), free + 1000, "a run", "make room").state == "bad"
    assert doctor.check_free_space(str(tmp_path), 0, "a run", "make room").state == "ok"
    assert doctor.check_free_space(str(tmp_path / "none"), 1, "a run", "make room").state == "note"
