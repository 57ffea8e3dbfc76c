"""What is published is whole and named once: packages, changelog, and the workflow that publishes them."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command_line import printed
from tests.support.paths import ROOT

pytestmark = pytest.mark.integration

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
NOT_SHIPPED = (".c", ".h")  # of the packages' folders: what the wheel was compiled from


def tracked(*folders: str) -> list[str]:
    listing = ["git", "ls-files", "-coz", "--exclude-standard", *folders]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in names.split("\0") if name and (ROOT / name).is_file())


def test_the_wheel_has_all_that_is_needed_and_comes_from_the_sources_alone(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", checkout]
    subprocess.run(
        build, check=True, capture_output=True
    )  # the wheel of what `make dist` puts into the sdist
    (wheel,) = (tmp_path / "dist").glob(f"maestream-{VERSION}-*.whl")
    assert (tmp_path / "dist" / f"maestream-{VERSION}.tar.gz").exists()
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        there = {name for name in archive.namelist() if not name.endswith((".so", "/"))}
    wanted = {
        n
        for n in tracked("maestream.py", "pipeline", "trainer", "cluster", "recipes")
        if not n.endswith(NOT_SHIPPED)
    }
    assert {name for name in there if ".dist-info/" not in name} == wanted

    def python(code: str) -> str:
        """In a folder where nothing is, with nothing of ours but the wheel."""
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"],
            cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    ours = "from importlib.metadata import version; print(version('maestream'))"
    assert python(ours).strip() == VERSION
    load = "from trainer.config.recipe import *; print(load_config(PretrainConfig, 'recipes/pretrain_vit_base.yaml').epochs)"
    assert python(load).strip() == "800.0"
    assert python("import cluster.cli.main; print(cluster.cli.main.__file__)").strip() == str(
        site / "cluster/cli/main.py"
    )
    scripts = (site / f"maestream-{VERSION}.dist-info/entry_points.txt").read_text()
    assert scripts.split() == ["[console_scripts]", "maestream", "=", "maestream:main"]


def test_the_version_is_said_once() -> None:
    assert printed("--version").split()[-1] == VERSION == importlib.metadata.version("maestream")
    version = re.compile(rf"(?<![\w.]){re.escape(VERSION)}(?![\w.])")
    names = tracked(
        "pipeline", "trainer", "cluster", "docker", ".ci", ".github", "Makefile", "pyproject.toml"
    )
    said = [name for name in names for _ in version.findall((ROOT / name).read_text())]
    assert said == ["pyproject.toml"]


def release_notes(root: Path, tag: str) -> str:
    done = subprocess.run(
        [sys.executable, root / ".ci/release_notes.py", tag], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    return done.stdout or done.stderr


def test_a_tag_is_published_with_its_own_section_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/release_notes.py", tmp_path / ".ci")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    changelog = "# Changelog\n\n## [1.2.0] - {}\n\n### Added\n\n- New.\n\n## [1.1.0] - 2026-01-01\n\n- Old.\n"
    (tmp_path / "CHANGELOG.md").write_text(changelog.format("2026-12-24"))
    assert release_notes(tmp_path, "v1.2.0") == "### Added\n\n- New.\n"
    assert "has version 1.2.0: the tag has to be v1.2.0" in release_notes(tmp_path, "v1.1.0")
    (tmp_path / "CHANGELOG.md").write_text(changelog.format("Unreleased"))
    assert "or give it its date" in release_notes(tmp_path, "v1.2.0")


def test_the_changelog_has_a_section_of_this_version() -> None:
    assert re.search(rf"^## \[{re.escape(VERSION)}\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_ci_runs_what_people_run() -> None:
    assert ".ci/run" in commands("test")
    assert "make dist" in commands("test")
    assert "make image TARGET=cpu" in commands("image")
    assert JOBS["publish-image"]["strategy"]["matrix"]["target"] == ["cpu", "gpu"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {word for job in JOBS for run in commands(job) for word in re.findall(r"\bmake ([\w-]+)", run)}
    assert asked <= targets


def test_only_a_tag_that_passed_the_tests_is_published() -> None:
    for name, job in JOBS.items():
        assert name.startswith("publish-") == ("permissions" in job), "only who publishes may write"
        if name.startswith("publish-"):
            assert job["if"] == "startsWith(github.ref, 'refs/tags/v')"
            needed, above = set(), [name]
            while above:
                needs = JOBS[above.pop()].get("needs", [])
                above += [needs] if isinstance(needs, str) else needs
                needed |= set(above)
            assert "test" in needed
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert JOBS["publish-packages"]["permissions"] == {"id-token": "write"}
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    assert set(re.findall(r"secrets\.(\w+)", text)) == {"GITHUB_TOKEN"}


@pytest.mark.parametrize("job", JOBS)
def test_actions_are_pinned(job: str) -> None:
    for step in JOBS[job]["steps"]:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
