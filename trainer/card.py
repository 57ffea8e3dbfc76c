"""The model card of an export: what a model was trained on, how, for how long, what it came to, and with which versions."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.secrets import without_secrets
from pipeline.storage import Store
from trainer.config import ClassifierConfig, EncoderConfig, LinprobeConfig, ModelConfig, RunConfig
from trainer.metrics import history
from trainer.pretrained import About
from trainer.run import read_known

MEASURED = {  # of metrics: what a card says, in this order
    "loss": "training loss of the last step",
    "val_top1": "top-1 on the validation set, %",
    "val_top5": "top-5 on the validation set, %",
    "knn_top1": "top-1 of nearest neighbours, %",
}
LIBRARY = {"timm": "timm", "transformers": "transformers"}


def model_card(about: About, model: EncoderConfig, form: str, use: str) -> str:
    """Markdown, with the header that model hubs read.

    Args:
        about: what was exported.
        model: what of it was: its encoder alone, perhaps.
        form: the format.
        use: Python that loads it.
    """
    task = "image-classification" if isinstance(model, ClassifierConfig) else "image-feature-extraction"
    header = {
        "library_name": LIBRARY.get(form, "maestream"),
        "pipeline_tag": task,
        "tags": ["masked-autoencoder", "vit"],
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_title(model)}",
        *([_of_run(about)] if about.run else [_of_source(about)]),
        f"## Use\n\n{use}",
        "Pixels are RGB in [0, 1], less (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225)."
        if form in ("transformers", "timm", "authors")
        else "Images are uint8[n, 3, height, width], RGB; the model normalises them itself.",
    ]
    return without_secrets("\n\n".join(parts)) + "\n"


def _title(model: EncoderConfig) -> str:
    height, width = model.size
    kind = "Encoder"
    if isinstance(model, ModelConfig):
        kind = f"Masked autoencoder (decoder: {model.decoder_depth} blocks of width {model.decoder_width})"
    elif isinstance(model, ClassifierConfig):
        kind = "Classifier"
    return (
        f"{kind}: a ViT of {model.depth} blocks, width {model.width}, {model.heads} heads, patches of {model.patch_size} "
        f"pixels, images of {height} × {width}"
    )


def _of_run(about: About) -> str:
    assert about.run is not None
    assert about.store is not None
    assert about.step is not None
    known = read_known(about.store)
    data = known.data
    said = f"Trained with `maestream {about.run.task}`: {about.step:,} steps of {about.run.global_batch:,} images."
    if isinstance(about.run, LinprobeConfig):
        said += " This is the frozen encoder, without the linear layer that was trained on it."
    named = (
        f"- dataset: {data['name']}, {data['samples']:,} samples, {data['classes']:,} classes\n"
        if data
        else ""
    )
    metrics = "\n".join(f"- {name}: {value}" for name, value in _measured(about.store, about.step))
    versions = "\n".join(f"- {name} {version}" for name, version in _versions(known.versions).items())
    return "\n\n".join(
        [
            said,
            f"## Data\n\n{named}- fingerprint: `{known.fingerprint}`",
            f"## Metrics\n\nAfter step {about.step:,} of run `{known.run_id}`:\n\n{metrics or '- none'}",
            f"## Versions\n\n{versions}",
            f"## Recipe\n\n```yaml\n{_recipe(about.run)}```",
        ]
    )


def _recipe(run: RunConfig) -> str:
    """The config, without where things lie: a card tells it to everybody."""
    return yaml.safe_dump(_unplaced(run.model_dump()), sort_keys=False, allow_unicode=True)


def _unplaced(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _unplaced(value) for key, value in tree.items()}
    if isinstance(tree, str) and (tree.startswith("/") or "://" in tree):
        return "…/" + tree.rstrip("/").rpartition("/")[2]
    return tree


def _of_source(about: About) -> str:
    """Of a model that no run of ours lies beside: what is known of where it came from."""
    told = "\n".join(f"- {key}: {_plain(value)}" for key, value in about.source.items() if value)
    return f"## Where it comes from\n\n{told or '- not known'}"


def _plain(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _measured(store: Store, step: int) -> Iterator[tuple[str, str]]:
    """What a run's metrics and evaluations say of the state after `step` steps: of each number the newest by then."""
    newest: dict[str, tuple[int, float]] = {}
    for row in history(store):
        for name in MEASURED.keys() & row.keys():
            at = int(row["knn_step"]) - 1 if name == "knn_top1" else row["step"]  # its row is a later one
            if at < step and at >= newest.get(name, (-1, 0.0))[0]:
                newest[name] = at, row[name]
    for name, says in MEASURED.items():
        if name in newest:
            at, value = newest[name]
            late = "" if at == step - 1 else f" (after step {at + 1:,})"
            yield says + late, f"{value:.4f}" if name == "loss" else f"{value:.2f}"
    for file in store.names("evaluations"):
        if file.startswith(f"evaluations/step-{step:08d}-"):
            found = json.loads(store.read(file))
            yield f"top-1 on {found['data'].rpartition('/')[2]}, %", f"{found['val_top1']:.2f}"


def _versions(by_attempt: dict[int, dict[str, str]]) -> dict[str, str]:
    return by_attempt[max(by_attempt)] if by_attempt else {}
