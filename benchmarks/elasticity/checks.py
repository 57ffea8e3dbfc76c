"""Whether a run of benchmarks.elasticity equals an uninterrupted one."""

from pathlib import Path

from pipeline.dataset.dataset import open_dataset
from pipeline.storage.store import open_store
from trainer.config.recipe import load_config
from trainer.config.schema import PretrainConfig
from trainer.run.metrics import read_metrics
from trainer.run.run import fix_order, make_order


def parameters_apart(out: Path, reference: Path) -> float:
    """The largest difference between the final parameters of two runs."""
    from safetensors.torch import load_file

    newest = max((out / "checkpoints").glob("step-*"))
    ours = load_file(newest / "model.safetensors")
    theirs = load_file(reference / "checkpoints" / newest.name / "model.safetensors")
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)


def ledger_is_exact(out: Path, recipe: Path, data: str, steps: int) -> bool:
    """Whether a run's history has each step once, each with the samples that the order says."""
    dataset = open_dataset(data)
    config = fix_order(load_config(PretrainConfig, recipe), dataset)
    order = make_order(config, dataset)
    rows = read_metrics(open_store(str(out)))
    return len(rows) == steps and all(
        sorted(row["sample_ids"]) == sorted(order.step_ids(step, 0, 1).tolist())
        for step, row in enumerate(rows)
    )
