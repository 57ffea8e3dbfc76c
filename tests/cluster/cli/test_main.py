"""Hints of the command line."""

from collections.abc import Iterator

import click
import pytest

from cluster.cli.main import cli, main


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            "pretrain --epochs 3",
            "No such option '--epochs'. Did you mean epochs=3? (recipe keys have no dashes)",
        ),
        ("pretrain --epochs=3", "Did you mean epochs=3?"),
        ("linprobe --global-batch 64", "Did you mean global_batch=64?"),
        ("pretrain --model.width=48", "Did you mean model.width=48?"),
        ("pretrain --ledgr", "--ledger"),  # click's own hint
        ("report --epochs 3", None),  # it has no recipe
        ("pretrain --no-such 3", None),
    ],
)
def test_a_recipe_key_that_is_passed_as_an_option(
    words: str, hint: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["maestream", *words.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert "No such option" in errors
    assert hint in errors if hint else "recipe keys" not in errors


def _commands(group: click.Group, above: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{above}{name} ")
        else:
            yield above + name, command


def test_no_option_takes_a_number_that_is_none() -> None:
    """NaN passes each comparison, and infinity each minimum."""
    options = [(name, option) for name, command in _commands(cli) for option in command.params]
    numbers = [
        (name, option) for name, option in options if isinstance(option.type, click.types.FloatParamType)
    ]
    assert len(numbers) > 5
    for name, option in numbers:
        for text in ("nan", "inf", "-inf"):
            try:
                option.type.convert(text, option, None)
            except click.BadParameter:
                continue
            pytest.fail(f"maestream {name} takes {option.opts[-1]} {text}")
