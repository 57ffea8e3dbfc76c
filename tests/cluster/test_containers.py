"""The images of docker/, and the cluster of containers that compose.yaml makes. They need a Docker engine, which DOCKER_HOST
names, and where images cannot be pulled, those of tests/containers/stand_ins.sh. TORCH_CPU is the index that torch comes from, if not
PyTorch's own."""

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
from conftest import ROOT
from run_control import wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
COMPOSE_FILE = ROOT / "docker/compose.yaml"
LARGEST = 2.2e9  # bytes of the CPU's image


def docker(*words: object) -> str:
    done = subprocess.run(["docker", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image() -> str:
    """The CPU's image, built."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker engine")
    subprocess.run([ROOT / "tests/containers/stand_ins.sh"], check=True)
    more = ["--build-arg", f"TORCH_CPU={os.environ['TORCH_CPU']}"] if "TORCH_CPU" in os.environ else []
    subprocess.run(
        ["docker", "build", "--network", "host", *more, "-f", "docker/Dockerfile", "--target", "cpu", "-t", "maestream:cpu", "."],
        cwd=ROOT, env={**os.environ, "DOCKER_BUILDKIT": "1"}, check=True,
    )  # fmt: skip
    return "maestream:cpu"


def test_the_image_is_small_tidy_and_ready(image: str) -> None:
    told = json.loads(docker("image", "inspect", image))[0]
    assert told["Size"] < LARGEST
    assert told["Config"]["User"] == "1000"
    assert told["Config"]["Healthcheck"]["Test"] == ["CMD", "healthy"]
    assert told["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    run = ("run", "--rm", "--shm-size=8g", image)
    assert docker(*run, "id", "-u") == "1000"
    assert docker(*run, "bash", "-c", "command -v gcc || echo none") == "none"
    assert "pillow-simd" in docker(*run, "maestream", "doctor")  # which ends well


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
    """What the demo prints, while it runs."""
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


def test_the_demo_trains_across_containers_that_are_killed_come_back_and_go(demo: Path) -> None:
    def reach(what: str, seconds: float = 900) -> None:
        wait_until(lambda: re.search(what, demo.read_text()) or not alive(), seconds)
        assert re.search(what, demo.read_text()), demo.read_text()[-3000:]

    def alive() -> bool:
        return time.monotonic() < begun + 60 or bool(docker("ps", "-q", "--filter", "name=maestream-demo"))

    begun = time.monotonic()
    reach(r"step [3-9]\d/320.* workers 2")
    killed, stays = workers()
    docker("kill", killed)
    reach(r"attempt 2: 1 workers")
    docker("start", killed)
    reach(r"attempt 3: 2 workers")
    docker("stop", "--time", "60", stays)  # as Kubernetes ends a pod: with notice
    reach(r"attempt 4: 1 workers from step \d+, 0 steps redone")
    assert "1 of its nodes will be gone soon: the workers save their work, and leave" in demo.read_text()
    assert docker("wait", "maestream-demo") == "0"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(ROOT / "runs/demo-docker")
    docker("cp", "maestream-demo:/home/maestream/demo", ROOT / "runs/demo-docker")
    assert (ROOT / "runs/demo-docker/held-out.png").read_bytes().startswith(b"\x89PNG")
    assert "steps redone" in (ROOT / "runs/demo-docker/report.html").read_text()
    redone = [int(n) for n in re.findall(r"(\d+) steps redone", demo.read_text())]
    assert redone[0] < 20
    assert not any(redone[1:])
