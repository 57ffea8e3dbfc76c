"""Check that every relative link in the repository's Markdown files points to a file, and to a heading in it.

Prints each dead link as FILE: LINK and exits with 1. Sphinx checks docs/ again; README.md and others are only checked here.
Anchors follow GitHub's rule: lower case, punctuation removed, blanks become hyphens.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
FENCE = re.compile(r"^(`{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)


def markdown_files() -> list[Path]:
    listing = ["git", "ls-files", "-co", "--exclude-standard", "*.md"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).exists()]


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings, and those that are set by hand: `(name)=`."""
    text = FENCE.sub("", file.read_text())
    found: set[str] = set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def dead_links(file: Path) -> list[str]:
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", file.read_text()))
    dead = []
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def main() -> None:
    found = [f"{file.relative_to(ROOT)}: {link}" for file in markdown_files() for link in dead_links(file)]
    print("\n".join(found) or "all relative links are alive")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
