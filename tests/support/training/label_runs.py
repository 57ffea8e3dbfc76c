"""Fine-tuning and linear-probing runs of a tiny model."""

from typing import Any

from tests.support.training.small_runs import SMALL
from trainer.config.recipe import parse_config
from trainer.config.schema import FinetuneConfig, LinprobeConfig
from trainer.train.finetune import finetune
from trainer.train.linprobe import linprobe
from trainer.weights.init import resolve_init

SHAPE = {name: SMALL["model"][name] for name in ("image_size", "patch_size", "width", "depth", "heads")}


COMMON = {name: SMALL[name] for name in ("global_batch", "log_every", "precision")} | {
    "epochs": 2.0,
    "micro_batch": 3,
    "data": {**SMALL["data"], "val_crop": 1.0},
}


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "finetune": (
        FinetuneConfig,
        finetune,
        {"model": {**SHAPE, "drop_path": 0.2}, "optim": {"blr": 0.05, "warmup_epochs": 0.5, "ema": 0.9}},
    ),
    "linprobe": (LinprobeConfig, linprobe, {"model": SHAPE, "optim": {"blr": 5.0, "warmup_epochs": 0.5}}),
}


def config_of(kind: str, init: Any, val: str | None, **changes: Any) -> Any:
    tree = {**COMMON, **KINDS[kind][2], "init": init, **changes}
    tree["data"] = {**tree["data"], "val": val}
    return resolve_init(parse_config(KINDS[kind][0], tree, "test"))
