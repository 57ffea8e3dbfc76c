"""Recipes and studies have the numbers of their sources."""

import pytest

from tests.support.paths import ROOT
from trainer.config.model_schema import EncoderConfig
from trainer.config.recipe import load_config, with_overrides
from trainer.config.schema import FinetuneConfig, LinprobeConfig, PretrainConfig
from trainer.studies.study import STUDIES as STUDY_FILES
from trainer.studies.study import load_study, make_trial_jobs

RECIPES = ROOT / "recipes"
SHAPES = {  # paper, section 4; Dosovitskiy et al. 2020, Table 1; H has patches of 14
    "base": (768, 12, 12, 16),
    "large": (1024, 24, 16, 16),
    "huge": (1280, 32, 16, 14),
}
# The authors' FINETUNE.md: epochs, blr, layer decay, drop path; for all: batch 1024, decay 0.05, mixup 0.8,
# cutmix 1.0, reprob 0.25, and main_finetune.py's defaults: warm-up 5, min_lr 1e-6, smoothing 0.1, rand-m9-mstd0.5-inc1.
FINETUNE_MD = {"base": (100, 5e-4, 0.65, 0.1), "large": (50, 1e-3, 0.75, 0.2), "huge": (50, 1e-3, 0.75, 0.3)}
# Paper, Table 9: epochs, drop path; for all: lr 1e-3, decay 0.05, β 0.9 and 0.999, layer-wise decay 0.75, batch 1024,
# warm-up 5, RandAug (9, 0.5), label smoothing 0.1, mixup 0.8, cutmix 1.0.
TABLE_9 = {"base": (100, 0.1), "large": (50, 0.1), "huge": (50, 0.2)}
# Paper, Table 11 (appendix A.2): epochs, drop path; for all: lr 1e-4, decay 0.3, β 0.9 and 0.95, batch 4096, warm-up 20,
# RandAug (9, 0.5), label smoothing 0.1, mixup 0.8, cutmix 1.0, EMA 0.9999.
TABLE_11 = {"base": (300, 0.1), "large": (200, 0.2), "huge": (200, 0.2)}


def shape(model: EncoderConfig) -> tuple[int, int, int, int]:
    return model.width, model.depth, model.heads, model.patch_size


@pytest.mark.parametrize("size", SHAPES)
def test_pretraining_is_table_8(size: str) -> None:
    config = load_config(PretrainConfig, RECIPES / f"pretrain_vit_{size}.yaml")
    optim = config.optim
    assert (optim.blr, optim.weight_decay, optim.beta1, optim.beta2) == (1.5e-4, 0.05, 0.9, 0.95)
    assert (config.global_batch, config.epochs, optim.warmup_epochs) == (4096, 800, 40)
    assert config.data.crop_area == (0.2, 1.0)
    assert (config.data.crops, config.data.flips, config.jitter) == ("random", True, 0)
    assert (config.model.mask_ratio, config.model.norm_pix) == (0.75, True)  # Table 1; Table 3
    assert (config.model.sampling, config.model.masked) == ("random", "nothing")
    assert shape(config.model) == SHAPES[size]
    model = config.model
    assert (model.decoder_width, model.decoder_depth, model.decoder_heads) == (512, 8, 16)


@pytest.mark.parametrize("size", SHAPES)
def test_fine_tuning_is_the_authors_document(size: str) -> None:
    config = load_config(FinetuneConfig, RECIPES / f"finetune_vit_{size}.yaml", ("init.run=run",))
    optim, mixing = config.optim, config.mixing
    found = (config.epochs, optim.blr, optim.layer_decay, config.model.drop_path)
    assert found == FINETUNE_MD[size]
    assert (optim.weight_decay, optim.beta1, optim.beta2) == (0.05, 0.9, 0.999)
    assert (config.global_batch, optim.warmup_epochs, optim.min_lr, optim.ema) == (1024, 5, 1e-6, 0)
    assert (mixing.magnitude, mixing.magnitude_std, mixing.erase) == (9, 0.5, 0.25)
    assert (mixing.mixup, mixing.cutmix, mixing.smoothing) == (0.8, 1.0, 0.1)
    assert (config.model.pool, config.blocks) == ("mean", "all")
    assert config.data.crop_area == (0.08, 1.0)
    assert shape(config.model) == SHAPES[size]


@pytest.mark.parametrize("size", SHAPES)
def test_fine_tuning_is_table_9(size: str) -> None:
    config = load_config(FinetuneConfig, RECIPES / f"finetune_vit_{size}_paper.yaml", ("init.run=run",))
    optim, mixing = config.optim, config.mixing
    assert (config.epochs, config.model.drop_path) == TABLE_9[size]
    assert (optim.blr, optim.weight_decay, optim.beta1, optim.beta2) == (1e-3, 0.05, 0.9, 0.999)
    assert (optim.layer_decay, config.global_batch, optim.warmup_epochs) == (0.75, 1024, 5)
    assert (mixing.magnitude, mixing.magnitude_std) == (9, 0.5)
    assert (mixing.mixup, mixing.cutmix, mixing.smoothing, mixing.erase) == (0.8, 1.0, 0.1, 0)
    assert config.model.pool == "class"  # appendix A.1
    assert config.data.crop_area == (0.08, 1.0)
    assert shape(config.model) == SHAPES[size]


@pytest.mark.parametrize("size", SHAPES)
def test_linear_probing_is_table_10(size: str) -> None:
    config = load_config(LinprobeConfig, RECIPES / f"linprobe_vit_{size}.yaml", ("init.run=run",))
    optim = config.optim
    assert (optim.blr, optim.weight_decay, optim.momentum) == (0.1, 0, 0.9)
    # The authors' FINETUNE.md: 90 epochs for B, 50 for L and H.
    assert (config.global_batch, optim.warmup_epochs) == (16384, 10)
    assert config.epochs == (90 if size == "base" else 50)
    assert (config.data.crops, config.data.crop_area, config.data.flips) == ("random", (0.08, 1.0), True)
    assert shape(config.model) == SHAPES[size]


@pytest.mark.parametrize("size", SHAPES)
def test_training_from_scratch_is_table_11(size: str) -> None:
    config = load_config(FinetuneConfig, RECIPES / f"scratch_vit_{size}.yaml")
    optim, mixing = config.optim, config.mixing
    assert config.init == "scratch"
    assert (config.epochs, config.model.drop_path) == TABLE_11[size]
    assert (optim.blr, optim.weight_decay, optim.beta1, optim.beta2) == (1e-4, 0.3, 0.9, 0.95)
    assert (config.global_batch, optim.warmup_epochs, optim.ema, optim.layer_decay) == (4096, 20, 0.9999, 1)
    assert (mixing.magnitude, mixing.magnitude_std) == (9, 0.5)
    assert (mixing.mixup, mixing.cutmix, mixing.smoothing, mixing.erase) == (0.8, 1.0, 0.1, 0)
    assert shape(config.model) == SHAPES[size]


# Paper: name of the study → of each of its trials, what is changed, and top-1 of a ViT-L on ImageNet after fine-tuning and
# by linear probe (Tables 1a to 1f, Fig. 5, Fig. 7; it has no autoencoder that only removes noise).
STUDIES: dict[str, list[tuple[dict[str, object], tuple[float, float] | None]]] = {
    "decoder-depth": [
        ({"decoder_depth": 1}, (84.8, 65.5)),
        ({"decoder_depth": 2}, (84.9, 70.0)),
        ({"decoder_depth": 4}, (84.9, 71.9)),
        ({"decoder_depth": 8}, (84.9, 73.5)),
        ({"decoder_depth": 12}, (84.4, 73.3)),
    ],
    "decoder-width": [
        ({"decoder_width": 128, "decoder_heads": 16}, (84.9, 69.1)),
        ({"decoder_width": 256, "decoder_heads": 16}, (84.8, 71.3)),
        ({"decoder_width": 512, "decoder_heads": 16}, (84.9, 73.5)),
        ({"decoder_width": 768, "decoder_heads": 16}, (84.4, 73.1)),
        ({"decoder_width": 1024, "decoder_heads": 16}, (84.3, 73.1)),
    ],
    "mask-token": [
        ({"masked": "token"}, (84.2, 59.6)),
        ({"masked": "nothing"}, (84.9, 73.5)),
        ({"masked": "noise"}, None),
    ],
    "target": [({"norm_pix": False}, (84.9, 73.5)), ({"norm_pix": True}, (85.4, 73.9))],
    "augmentation": [
        ({"crops": "centre", "flips": False}, (84.0, 65.7)),
        ({"crops": "fixed"}, (84.7, 73.1)),
        ({"crops": "random"}, (84.9, 73.5)),
        ({"crops": "random", "jitter": 0.4}, (84.3, 71.9)),
    ],
    "mask-sampling": [
        ({"sampling": "random", "mask_ratio": 0.75}, (84.9, 73.5)),
        ({"sampling": "block", "mask_ratio": 0.5}, (83.9, 72.3)),
        ({"sampling": "block", "mask_ratio": 0.75}, (82.8, 63.9)),
        ({"sampling": "grid", "mask_ratio": 0.75}, (84.0, 66.0)),
    ],
    "masking-ratio": [
        ({"mask_ratio": ratio}, accuracies)
        for ratio, accuracies in {
            0.1: (83.2, 54.6),
            0.2: (83.4, 58.9),
            0.3: (83.4, 61.7),
            0.4: (84.7, 67.0),
            0.5: (84.9, 69.9),
            0.6: (85.0, 71.8),
            0.7: (84.9, 73.2),
            0.75: (84.9, 73.5),
            0.8: (84.5, 71.8),
            0.9: (83.0, 66.1),
        }.items()
    ],
    "schedule": [
        ({"epochs": 100}, (82.3, 57.3)),
        ({"epochs": 200}, (83.3, 64.4)),
        ({"epochs": 400}, (84.3, 69.7)),
        ({"epochs": 800}, (84.9, 73.5)),
        ({"epochs": 1600}, (85.1, 75.1)),
    ],
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_changes_what_the_paper_changed(name: str) -> None:
    study = load_study(name)
    base = load_config(PretrainConfig, RECIPES / "pretrain_vit_large.yaml")
    found = []
    for trial in study.trials:
        changed = with_overrides(base, trial.pretrain, name)
        flat = {**changed.model_dump(), **changed.data.model_dump(), **changed.model.model_dump()}
        keys = [key.partition("=")[0].rpartition(".")[2] for key in trial.pretrain]
        paper = (trial.paper["finetune"], trial.paper["linprobe"]) if trial.paper else None
        found.append(({key: flat[key] for key in keys}, paper))
    assert found == STUDIES[name]


@pytest.mark.parametrize(
    "recipe", ["pretrain_vit_base", "pretrain_vit_large", "pretrain_vit_huge", "cifar10_pretrain"]
)
def test_every_study_fits_every_recipe(recipe: str) -> None:
    config = load_config(PretrainConfig, RECIPES / f"{recipe}.yaml")
    assert {path.stem for path in STUDY_FILES.glob("*.yaml")} == set(STUDIES)
    for name in STUDIES:
        study = load_study(name)
        assert len(make_trial_jobs(study, {"pretrain": config}, "data", "val", "out")) == len(study.trials)
