"""The code stays in small modules and small folders."""

from pathlib import Path

from tests.support.paths import ROOT

MOST_LINES = 400
MOST_MODULES = 14  # of one folder, with __init__.py


def modules() -> list[Path]:
    top = ("pipeline", "trainer", "cluster", "benchmarks", "tests")
    return [path for folder in top for path in (ROOT / folder).rglob("*.py")]


def test_no_module_is_long() -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in modules()}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_no_folder_has_many_modules() -> None:
    folders = [path.parent for path in modules()]
    assert not {str(folder): n for folder in set(folders) if (n := folders.count(folder)) > MOST_MODULES}
