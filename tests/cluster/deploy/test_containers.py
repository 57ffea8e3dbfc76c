"""The images of docker/, and the cluster of docker/compose.yaml.

These tests need a Docker engine (DOCKER_HOST). Images that cannot be pulled are replaced by those of containers/stand_ins.sh.
TORCH_CPU is the URL of the package index for torch, if it is not PyTorch's own.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.runs import wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
COMPOSE_FILE = ROOT / "docker/compose.yaml"
MAX_IMAGE_BYTES = 2.2e9  # of the CPU image


def docker(*words: object) -> str:
    done = subprocess.run(["docker", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image() -> str:
    """Build the CPU image, and return its name."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker engine")
    subprocess.run([ROOT / "tests/cluster/deploy/containers/stand_ins.sh"], check=True)
    more = ["--build-arg", f"TORCH_CPU={os.environ['TORCH_CPU']}"] if "TORCH_CPU" in os.environ else []
    subprocess.run(
        ["docker", "build", "--network", "host", *more, "-f", "docker/Dockerfile", "--target", "cpu", "-t", "maestream:cpu", "."],
        cwd=ROOT, env={**os.environ, "DOCKER_BUILDKIT": "1"}, check=True,
    )  # fmt: skip
    return "maestream:cpu"


def test_cpu_image(image: str) -> None:
    info = json.loads(docker("image", "inspect", image))[0]
    assert info["Size"] < MAX_IMAGE_BYTES
    assert info["Config"]["User"] == "1000"
    assert info["Config"]["Healthcheck"]["Test"] == ["CMD", "healthy"]
    assert info["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    run = ("run", "--rm", "--shm-size=8g", image)
    assert docker(*run, "id", "-u") == "1000"
    assert docker(*run, "bash", "-c", "command -v gcc || echo none") == "none"
    assert "pillow-simd" in docker(*run, "maestream", "doctor")


def compose(*words: object) -> list[str]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    return [
        *(["docker", "compose"] if plugin else ["docker-compose"]),
        "-f",
        str(COMPOSE_FILE),
        *map(str, words),
    ]


@pytest.fixture
def demo(image: str, tmp_path: Path) -> Iterator[Path]:
    """Run the demo in the background; yield the file with its output."""
    down = compose("down", "--volumes", "--timeout", "5")
    subprocess.run(down, check=True)
    log = tmp_path / "demo.log"
    with log.open("w") as printed:
        run = subprocess.Popen(
            compose("run", "-T", "--name", "maestream-demo", "demo"), stdout=printed, stderr=printed
        )
    try:
        yield log
    finally:
        run.kill()
        subprocess.run(["docker", "rm", "-f", "maestream-demo"], check=False)
        subprocess.run(down, check=True)


def workers() -> list[str]:
    return docker(
        "ps", "--filter", "label=com.docker.compose.service=worker", "--format", "{{.Names}}"
    ).split()


def test_the_demo_survives_containers_that_are_killed_restarted_and_stopped(demo: Path) -> None:
    def reach(pattern: str, seconds: float = 900) -> None:
        wait_until(lambda: re.search(pattern, demo.read_text()) or not alive(), seconds)
        assert re.search(pattern, demo.read_text()), demo.read_text()[-3000:]

    def alive() -> bool:
        return time.monotonic() < started_at + 60 or bool(
            docker("ps", "-q", "--filter", "name=maestream-demo")
        )

    started_at = time.monotonic()
    reach(r"step [3-9]\d/320.* workers 2")
    killed, stays = workers()
    docker("kill", killed)
    reach(r"attempt 2: 1 worker resumes")
    docker("start", killed)
    reach(r"attempt 3: 2 workers")
    docker("stop", "--time", "60", stays)  # with notice, as Kubernetes ends a pod
    reach(r"attempt 4: 1 worker resumes at step \d+; 0 steps repeated")
    assert "1 node will shut down soon: the workers save their state and stop" in demo.read_text()
    assert docker("wait", "maestream-demo") == "0"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(ROOT / "runs/demo-docker")
    docker("cp", "maestream-demo:/home/maestream/demo", ROOT / "runs/demo-docker")
    assert (ROOT / "runs/demo-docker/held-out.png").read_bytes().startswith(b"\x89PNG")
    assert "repeated, " in (ROOT / "runs/demo-docker/report.html").read_text()
    redone = [int(n) for n in re.findall(r"(\d+) steps? repeated", demo.read_text())]
    assert redone[0] < 20
    assert not any(redone[1:])
