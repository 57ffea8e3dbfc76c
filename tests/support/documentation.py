"""Code blocks of the documentation, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from tests.support.paths import ROOT

BLOCK = re.compile(r"^( *)```([\w-]+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
# In the order in which a reader would run them: later pages use what earlier ones made.
RUN_FIRST = ("README.md", "docs/quickstart.md")


class Command(NamedTuple):
    """A command of a `console` block, with the lines of output that the page shows."""

    text: str
    output: list[str]


def blocks(page: str, language: str) -> list[str]:
    """Contents of a page's code blocks in a language, without indentation."""
    text = (ROOT / page).read_text()
    return [
        "\n".join(line.removeprefix(match[1]) for line in match[3].splitlines())
        for match in BLOCK.finditer(text)
        if match[2] == language
    ]


def console_commands(page: str) -> Iterator[Command]:
    """Commands after `$ ` in the `console` blocks of a page, with their expected output."""
    for block in blocks(page, "console"):
        for entry in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            command, *output = entry.splitlines()
            yield Command(command, [line for line in output if line.strip()])


def shell_words(block: str) -> Iterator[list[str]]:
    """The words of each simple command of a shell block, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&()<>"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def output_pattern(line: str) -> str:
    """A regular expression for a line of output: numbers may differ, `…` is anything, blanks are any blanks."""
    number = r"[-+]?\d[\d,.]*(?:e[-+]\d+)?"
    parts = [re.split(number, part) for part in line.strip().split("…")]
    escaped = [number.join(re.escape(text) for text in part) for part in parts]
    return re.sub(r"(?:\\ )+", r"\\s+", ".*?".join(escaped))


def missing_line(expected: list[str], output: str) -> str | None:
    """The first expected line that is not in the output after the lines before it; None if all are."""
    text, at = " ".join(output.split()), 0
    for line in expected:
        if line.strip() == "…":
            continue
        match = re.compile(output_pattern(line)).search(text, at)
        if match is None:
            return line
        at = match.end()
    return None
