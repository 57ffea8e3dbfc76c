"""What CHANGELOG.md says of the version of a tag, which CI publishes.

python .ci/release_notes.py v0.1.0 prints it. Exit code 1, and why, for a tag that is not the version of pyproject.toml, or whose
section is not there or has no date yet.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str) -> str:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if tag != f"v{version}":
        sys.exit(f"the tag is {tag}, and pyproject.toml has version {version}: the tag has to be v{version}")
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    for section in sections:
        title, _, text = section.partition("\n")
        if re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", title):
            return text.strip()
    sys.exit(f"CHANGELOG.md has no section `## [{version}] - YYYY-MM-DD`: write it, or give it its date")


if __name__ == "__main__":
    print(notes(sys.argv[1]))
