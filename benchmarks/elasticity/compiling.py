"""A simulated compilation, for benchmarks.elasticity."""

import time

from trainer.step.step import TrainedModel


def compile_first(model: TrainedModel, seconds: float) -> TrainedModel:
    """Let the first forward pass of a model in this process sleep, as if it were compiled and nothing were cached."""

    def wait(*_: object) -> None:
        hook.remove()
        time.sleep(seconds)

    hook = model.forward.register_forward_pre_hook(wait)
    return model
