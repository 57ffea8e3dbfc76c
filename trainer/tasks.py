"""What can be trained, by the `task` of its config."""

from collections.abc import Callable

from trainer.finetune import finetune
from trainer.linprobe import linprobe
from trainer.pretrain import pretrain

# Each takes its kind of config, a dataset and a run, see `trainer.loop.train`.
LOOPS: dict[str, Callable[..., bool]] = {"pretrain": pretrain, "finetune": finetune, "linprobe": linprobe}
