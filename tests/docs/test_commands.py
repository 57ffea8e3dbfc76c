"""Commands in the documentation: those in `console` blocks are run, those in `bash` blocks are parsed."""

import re
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from cluster.cli.main import cli
from tests.support.command_line import printed
from tests.support.documentation import (
    PAGES,
    RUN_FIRST,
    blocks,
    console_commands,
    missing_line,
    output_pattern,
    shell_words,
)
from tests.support.paths import ROOT
from trainer.config.recipe import CONFIG_TYPES, keys_from_options, load_config

# What makes the commands of the pages small enough for a test. Overrides at the end of a command count.
SMALLER = {"count=512": "count=48", "count=128": "count=24"}
SMALL_MODEL = ("model.image_size=16", "model.width=24", "model.depth=1", "model.heads=3")
SMALL = {
    "pretrain": (*SMALL_MODEL, "model.decoder_width=24", "model.decoder_depth=1", "model.decoder_heads=3",
                 "global_batch=8", "epochs=2"),
    "finetune": (*SMALL_MODEL, "global_batch=8", "epochs=1"),
    "linprobe": (*SMALL_MODEL, "global_batch=8", "epochs=1"),
}  # fmt: skip


@pytest.mark.integration
@pytest.mark.usefixtures("on_one_ray")
def test_console_blocks_print_what_the_pages_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outputs: dict[str, str] = {}  # a command that several pages show is run once
    for page in [*RUN_FIRST, *(page for page in PAGES if page not in RUN_FIRST)]:
        for command in console_commands(page):
            if command.text not in outputs:
                outputs[command.text] = run(command.text)
            missing = missing_line(command.output, outputs[command.text])
            assert missing is None, (
                f"{page}: `{command.text}` does not print\n{missing}\n--- it prints\n{outputs[command.text]}"
            )


def run(text: str) -> str:
    """Output of a command, made smaller; `maestream` runs in this process, which saves the seconds that imports take."""
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    commands = list(shell_words(text))
    if commands[0][0] == "maestream":
        ((_, *words),) = commands
        return printed(*words, *SMALL.get(words[0], ()))
    return subprocess.run(text, shell=True, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_bash_blocks_are_valid(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "bash"):
        for words in shell_words(block):
            if "maestream" in words and words[0] != "pip":  # also below docker run and the like
                check_command(words[words.index("maestream") + 1 :])
            if words[0] == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"{page}: make {words[1]}"
            if words[0] == "pytest":
                missing = [word for word in words if word.startswith("tests/") and not (ROOT / word).exists()]
                assert not missing, f"{page}: {missing}"
            if "-m" in words:
                module = words[words.index("-m") + 1]
                path = ROOT / module.replace(".", "/")
                assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (
                    f"{page}: {module}"
                )


def test_every_command_is_shown_somewhere() -> None:
    shown: set[str] = set()
    for page in PAGES:
        if page == "docs/reference/cli.md":
            continue
        texts = [*blocks(page, "bash"), *(command.text for command in console_commands(page))]
        for words in (words for text in texts for words in shell_words(text)):
            if "maestream" in words[:-1]:
                first, *rest = words[words.index("maestream") + 1 :]
                shown |= {first, " ".join([first, *rest[:1]])}
    assert leaf_commands(cli) <= shown


def leaf_commands(group: click.Group, above: str = "") -> set[str]:
    found: set[str] = set()
    for name, command in group.commands.items():
        found |= (
            leaf_commands(command, f"{above}{name} ") if isinstance(command, click.Group) else {above + name}
        )
    return found


def check_command(words: list[str]) -> None:
    """Check options, values and config keys of a maestream command without running it."""
    command: click.Command = cli
    context = click.Context(cli, info_name="maestream")
    while isinstance(command, click.Group):
        if words[0].startswith("-"):  # maestream --version
            command.make_parser(context).parse_args(list(words))
            return
        name, found, words = command.resolve_command(context, words)
        assert found is not None, name
        command, context = found, click.Context(found, info_name=name, parent=context)
    parsed, _, _ = command.make_parser(context).parse_args(list(words))
    # What was not given is click's own marker, or an empty tuple.
    values = {
        name: value
        for name, value in parsed.items()
        if isinstance(value, str | bool | list | tuple) and value
    }
    for parameter in command.params:
        given = parameter.name in values
        assert given or not parameter.required, f"{command.name}: {parameter.name} is missing in {words}"
        if given and not isinstance(parameter.type, click.Path):  # its files are not there
            parameter.type_cast_value(context, values[parameter.name])
    if command.name == "submit":
        check_command(list(values["command"]))
    task = values.get("task") or (command.name if command.name in CONFIG_TYPES else None)
    if task or command.name in ("kuberay", "aws", "end-to-end"):
        check_config(task or "pretrain", values)


def check_config(task: str, values: dict[str, Any]) -> None:
    keys = keys_from_options(values.get("init"), values.get("val"))
    load_config(CONFIG_TYPES[task], values["recipe"], tuple(values.get("overrides", ())), keys)


def test_output_patterns() -> None:
    assert missing_line(["loss 0.51 …", "2,048 images"], "loss 1.2e-03  lr 4\n48\nimages") is None
    assert missing_line(["b", "a"], "a b") == "a"
    assert output_pattern("a 1 … b") != "a 1 … b"


def test_a_wrong_command_is_noticed() -> None:
    for wrong in (
        ["shards", "bild", "a", "b"],
        ["shards", "build", "a"],
        ["shards", "build", "a", "b", "--no-such-option"],
        ["shards", "build", "a", "b", "--check", "sometimes"],
        ["submit", "--address", "a", "--", "report"],
    ):
        with pytest.raises((click.ClickException, AssertionError)):
            check_command(wrong)


RECIPES = sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "trainer/studies").glob("*.yaml")])


def head_fields(text: str) -> dict[str, str]:
    """Return the fields of a recipe's head, the comment above its keys: "# Command:    maestream …", by name."""
    fields: dict[str, str] = {}
    for line in re.findall(r"^#(.*)", text, re.MULTILINE):
        if field := re.fullmatch(r" ([A-Z][a-z]+): +(.+)", line):
            fields[field[1]] = field[2]
        elif fields:  # a continued line
            name = list(fields)[-1]
            fields[name] = fields[name].removesuffix("\\").strip() + " " + line.strip()
    return fields


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_reproduces_its_command_and_what_was_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = recipe.read_text()
    assert re.match(r"# [A-Z].*\.\n#\n", text), "the head starts with a sentence"
    fields = head_fields(text)
    assert [name for name in fields if name != "Note"] == [
        "Reproduces",
        "Command",
        "Hardware",
        "Time",
        "Result",
    ]
    for file in re.findall(r"(?:benchmarks/results|docs/images)/[\w.-]+\w", " ".join(fields.values())):
        assert Path(file).exists()
    program, *words = fields["Command"].split()
    assert program == "maestream"
    check_command(words)
    assert f"recipes/{recipe.name}" in words or ["study", recipe.stem] == words[:2]
