"""The training function of each task."""

from collections.abc import Callable

from trainer.train.finetune import finetune
from trainer.train.linprobe import linprobe
from trainer.train.pretrain import pretrain

# By the config's `task`. Each takes that task's config, a dataset and a run; see `trainer.train.loop.train`.
TRAIN_FUNCTIONS: dict[str, Callable[..., bool]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "linprobe": linprobe,
}
