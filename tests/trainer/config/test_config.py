"""Configs: recipes load, overrides apply, mistakes raise one clear message, and every key is documented."""

from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from pydantic import BaseModel

from pipeline.errors import UserError
from trainer.config.optim_schema import AdamWConfig
from trainer.config.recipe import CONFIG_TYPES, differences, dump_config, load_config, parse_config
from trainer.config.schema import FinetuneConfig, PretrainConfig, WorkersConfig
from trainer.models.mae import MAE
from trainer.step.optim import adamw, learning_rate

RECIPES = sorted(Path("recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_a_round_trip(recipe: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(recipe.read_text())
    kind = CONFIG_TYPES[tree.get("task", "pretrain")]
    init = ("init.run=run",) if kind is not PretrainConfig and "init" not in tree else ()
    config = load_config(kind, recipe, init)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(kind, tmp_path / "config.yaml") == config


def test_overrides_reach_nested_keys() -> None:
    config = load_config(
        PretrainConfig,
        "recipes/pretrain_vit_base.yaml",
        ("optim.blr=1e-3", "model.norm_pix=false", "workers=7"),
    )
    assert (config.optim.blr, config.model.norm_pix, config.epochs) == (1e-3, False, 800)
    assert config.workers == WorkersConfig(min=7, max=7)
    assert load_config(
        PretrainConfig, "recipes/pretrain_vit_base.yaml", ("workers={min: 2, max: 9}",)
    ).workers == WorkersConfig(min=2, max=9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.blrr=1", "unknown key optim.blrr: did you mean blr?"),
        ("globalbatch=1", "unknown key globalbatch: did you mean global_batch?"),
        ("epochs=many", "^epochs=many: expected a number, got 'many'$"),
        ("epochs=-1", "^epochs=-1: expected a number greater than 0, got -1$"),
        ("model.mask_ratio=1", "^model.mask_ratio=1: expected a number less than 1"),
        ("model.image_size=225", "image_size 225 is not divisible by patch_size 16"),
        ("model.image_size=[224, 225]", r"image_size \(224, 225\) is not divisible by patch_size 16"),
        ("model.heads=7", "width 768 is not divisible by heads 7"),
        ("data.decoder=opencv", "^data.decoder=opencv: expected 'auto', 'cpu' or 'dali'"),
        ("model=big", "^model=big: expected a dictionary, got 'big'$"),
        ("seed.x=1", "seed: expected an integer"),
        ("workers=true", "^workers=true: expected a non-boolean value, got True$"),
        ("workers=many", "^workers=many: expected a number or {min: 1, max: 8}, got 'many'$"),
        ("workers=0", "^workers=0: expected at least 1 worker, got 0$"),
        ("workers={min: 3, max: 2}", "^workers=…: min 3 is larger than max 2$"),
        ("epochs=3", "optim.warmup_epochs 40 is longer than the run's 3 epochs"),
        ("optim.min_lr=.nan", "^optim.min_lr=.nan: expected a finite number"),
        ("model={widht: 3}", "^model=…: unknown key model.widht: did you mean width?"),
        ("global_batch=1.5", "^global_batch=1.5: expected an integer, got 1.5$"),
        ("epochs", "an override has the form key=value"),
        ("epochs=[", "not valid YAML"),
    ],
)
def test_invalid_override_raises_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(PretrainConfig, "recipes/pretrain_vit_base.yaml", (override,))
    assert "\n" not in str(caught.value)


def test_mistakes_of_overrides_and_of_the_file_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: three\nseed: -1")
    with pytest.raises(UserError) as caught:
        load_config(PretrainConfig, tmp_path / "recipe.yaml", ("epochs=four", "epochs=five"))
    assert str(caught.value) == (
        f"epochs=five: expected a number, got 'five'; {tmp_path}/recipe.yaml: seed: expected a number greater than or equal "
        "to 0, got -1"
    )


@pytest.mark.parametrize(
    "override", ["init={}", "init.run={}", "init={{run: '{}', stp: 1}}", "init={{run: '{}'}}"]
)
def test_secrets_in_overrides_are_not_repeated(override: str) -> None:
    with pytest.raises(UserError, match="init") as caught:
        load_config(
            FinetuneConfig,
            "recipes/finetune_vit_base.yaml",
            (override.format("https://a:hunter2@x/y?z=hunter2"),),
        )
    assert "hunter2" not in str(caught.value)


def test_unreadable_config_raises_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config"):
        load_config(PretrainConfig, tmp_path / "none.yaml")
    for text in ("- a list", "key: [unclosed", "just text"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml"):
            load_config(PretrainConfig, tmp_path / "bad.yaml")


def test_recipes_are_found_from_any_folder_and_local_ones_take_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(PretrainConfig, "recipes/pretrain_vit_base.yaml").epochs == 800
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/pretrain_vit_base.yaml").write_text("epochs: 50")
    assert load_config(PretrainConfig, "recipes/pretrain_vit_base.yaml").epochs == 50
    with pytest.raises(UserError, match=r"^recipes/none\.yaml: no such config"):
        load_config(PretrainConfig, "recipes/none.yaml")


@pytest.mark.parametrize("task", CONFIG_TYPES)
def test_every_key_has_a_description(task: str) -> None:
    def check(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{prefix}{name}"
            for member in (field.annotation, *get_args(field.annotation)):
                if isinstance(member, type) and issubclass(member, BaseModel):
                    check(member, f"{prefix}{name}.")

    check(CONFIG_TYPES[task], "")


def test_keys_that_may_change_on_resume() -> None:
    old = parse_config(PretrainConfig, {}, "old")
    free = {
        "workers": 3,
        "log_every": 1,
        "checkpoint": {"keep": 9},
        "data": {"decoder": "dali", "threads": 2},
    }
    assert differences(old, parse_config(PretrainConfig, free, "new")) == []
    fixed = {"seed": 1, "optim": {"blr": 1e-3}, "data": {"lanes": 2}}
    assert differences(old, parse_config(PretrainConfig, fixed, "new")) == [
        "seed: 0 → 1",
        "optim.blr: 0.00015 → 0.001",
        "data.lanes: None → 2",
    ]


def test_weight_decay_groups_match_the_authors() -> None:
    config = load_config(PretrainConfig, "recipes/pretrain_vit_tiny.yaml")
    model = MAE(config.model)
    decayed, plain = adamw(model, config.optim).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {"cls_token", "mask_token", "patch_embed.proj.weight"} <= {names[id(p)] for p in decayed["params"]}
    assert all("bias" in names[id(p)] or "norm" in names[id(p)] for p in plain["params"])
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    grouped = {names[id(p)] for group in (decayed, plain) for p in group["params"]}
    assert grouped == {name for name, _ in model.named_parameters()} - {"pos_embed", "decoder_pos_embed"}


def test_learning_rate_schedule_matches_the_paper() -> None:
    steps_per_epoch, total = 312, 800 * 312

    def lr(step: int) -> float:
        return learning_rate(step, total, steps_per_epoch, 4096, AdamWConfig())

    assert lr(0) == 0
    assert lr(20 * 312) == pytest.approx(1.2e-3)
    assert lr(40 * 312) == pytest.approx(2.4e-3)
    assert lr(420 * 312) == pytest.approx(1.2e-3)
    assert lr(total - 1) < 1e-12 * 1e3
    assert torch.tensor([lr(s) for s in range(40 * 312, total, 1000)]).diff().max() < 0
