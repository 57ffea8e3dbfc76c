"""Hints of the command line."""

import pytest

from cluster.cli.main import main


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
