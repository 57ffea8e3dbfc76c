"""The documentation fits the code: generated pages are up to date, links are alive."""

import importlib.util
from types import ModuleType

import pytest

from tests.support.paths import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "config.md", "metrics.md"])
def test_generated_pages_are_up_to_date(name: str) -> None:
    page = script("generate_reference").pages()[name]
    assert (ROOT / "docs/reference" / name).read_text() == page, "run `make docs-reference`"


def test_relative_links_point_to_files_and_headings() -> None:
    links = script("check_links")
    dead = {str(file): found for file in links.markdown_files() if (found := links.dead_links(file))}
    assert not dead


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
