"""Sphinx configuration: `make docs` builds docs/ into build/docs/."""

import os
import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "maestream"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
html_title = f"{project} {version}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4  # the anchors that GitHub gives headings, so that links work in both places
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
suppress_warnings = ["misc.highlighting_failure"]  # …, ✓ and the like in output


def name_repository_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to files outside docs/ work on GitHub. The HTML pages have no such files, so they show the path instead.

    docs/check_links.py checks that the files exist.
    """
    folder = (DOCS / page).parent

    def show(match: re.Match[str]) -> str:
        text, link = match[1], match[2].partition("#")[0]
        path = Path(os.path.normpath(folder / link))
        if path.is_relative_to(DOCS):
            return match[0]
        name = f"`{path.relative_to(ROOT)}`"
        return name if name.strip("`").endswith(text.replace("\\", "")) else f"{text} ({name})"

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)", show, source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", name_repository_files)
