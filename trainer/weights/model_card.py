"""Model card: the README.md of an export. It says how to load the model, what it was trained on and how, its metrics, and the
versions of the software."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.images.pixels import RGB
from pipeline.secrets import without_secrets
from pipeline.storage.store import Store
from pipeline.text import plural
from trainer.config.model_schema import ClassifierConfig, EncoderConfig, ModelConfig
from trainer.config.schema import CheckpointConfig, LinprobeConfig, RunConfig
from trainer.labels.labels import KIND_NAMES
from trainer.labels.measures import MAIN, MEASURES, found_measures
from trainer.models.pixels import describe_normalisation
from trainer.models.vit import pixel_statistics
from trainer.run.metrics import history
from trainer.run.run import read_record
from trainer.weights.pretrained import ModelInfo
from trainer.weights.state_dicts import TRANSFORMERS_CLASSES, model_kind

METRICS = {  # metric → its label on the card, in this order
    "loss": "training loss at the last step",
    **{f"val_{name}": f"validation {measure.name}" for name, measure in MEASURES.items() if name != "loss"},
    **{f"knn_{name}": f"k-NN {MEASURES[name].name}" for name in ("top1", "map", "r2", "mae")},
}
LIBRARIES = {"timm": "timm", "transformers": "transformers"}
SNAPSHOTS = CheckpointConfig().snapshots  # by default a system folder, which is the same everywhere
SOURCE_LABELS = {"taken": "assumptions"}  # key of ModelInfo.source → its label on the card
NORMALISED_INPUT = (
    "transformers",
    "timm",
    "authors",
)  # formats whose models do not normalise pixels themselves


def model_card(info: ModelInfo, model: EncoderConfig, export_format: str) -> str:
    """Return the card as Markdown, with the YAML header that model hubs read.

    Args:
        info: the model that was exported.
        model: architecture of the exported part: all of it, or its encoder alone.
        export_format: one of `trainer.weights.formats.FORMATS`.
    """
    task = "image-classification" if isinstance(model, ClassifierConfig) else "image-feature-extraction"
    output = output_name(info, model)
    if output == "numbers":
        task = "other"  # hubs have no task for regression
    header = {
        "library_name": LIBRARIES.get(export_format, "maestream"),
        "pipeline_tag": task,
        "tags": ["masked-autoencoder", "vit"],
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_title(model)}",
        f"## Usage\n\n```python\n{usage(model, export_format, output)}\n```",
        _describe_input(model, export_format),
        _describe_run(info) if info.run else _describe_source(info),
    ]
    return without_secrets("\n\n".join(parts)) + "\n"


def output_name(info: ModelInfo, model: EncoderConfig) -> str:
    """Return what a model's output is called: tokens, logits, or numbers."""
    if not isinstance(model, ClassifierConfig):
        return "tokens"
    return "numbers" if info.labels and info.labels.kind == "numbers" else "logits"


def usage(model: EncoderConfig, export_format: str, output: str) -> str:
    """Return Python code that loads an export from "FOLDER" and applies it to `images`. `output`: see `output_name`."""
    if export_format == "safetensors":
        if isinstance(model, ClassifierConfig):
            return f'from maestream import load_classifier\n\n{output} = load_classifier("FOLDER")(images)'
        return 'from maestream import load_encoder\n\ntokens = load_encoder("FOLDER")(images)'
    if export_format == "transformers":
        name = TRANSFORMERS_CLASSES[model_kind(model)]
        options = ", add_pooling_layer=False" if name == "ViTModel" else ""
        return (
            f'from transformers import {name}\n\noutput = {name}.from_pretrained("FOLDER"{options})(images)'
        )
    if export_format == "timm":
        return (
            "import timm\n\n"
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
            "output = model(images)"
        )
    if export_format == "authors":
        return (
            "import torch\n\n"
            "# model: built with the MAE authors' code, github.com/facebookresearch/mae\n"
            'model.load_state_dict(torch.load("FOLDER/model.pth")["model"])'
        )
    if export_format == "onnx":
        return (
            "import onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
            f'({output},) = session.run(None, {{"images": images}})'
        )
    return f'import torch\n\n{output} = torch.export.load("FOLDER/model.pt2").module()(images)'


def _describe_input(model: EncoderConfig, export_format: str) -> str:
    shape = f"[n, {model.channels}, {', '.join(map(str, model.size))}]"
    mean, std = pixel_statistics(model)
    colours = ", RGB" if model.channels == 3 else ""
    if export_format in NORMALISED_INPUT:
        # The card's code for the authors' model only loads the weights.
        images = "The model takes images as" if export_format == "authors" else "`images` are"
        scaled = {
            "uint8": ", scaled to [0, 1]",
            "uint16": f", values of {model.pixel_bits} bits, divided by 65535",
            "float32": "",
        }
        return (
            f"{images} float32{shape}{colours}{scaled[model.pixel_dtype]}, minus the mean {mean}, divided by the standard "
            f"deviation {std}."
        )
    array = "a NumPy array" if export_format == "onnx" else "a tensor"
    text = f"`images` is {array}, {model.pixel_dtype}{shape}{colours}. The model normalises the pixels itself"
    if model.pixels == RGB:
        return f"{text}."
    return f"{text}: {describe_normalisation(model).removeprefix('normalise: ')}."


def _title(model: EncoderConfig) -> str:
    height, width = model.size
    kind = "ViT encoder"
    if isinstance(model, ModelConfig):
        kind = f"Masked autoencoder (decoder: {plural(model.decoder_depth, 'block')} of width {model.decoder_width})"
    elif isinstance(model, ClassifierConfig):
        kind = "ViT classifier"
    return (
        f"{kind}: {plural(model.depth, 'block')}, width {model.width}, {plural(model.heads, 'head')}, patch size "
        f"{model.patch_size}, image size {height} × {width}"
    )


def _describe_run(info: ModelInfo) -> str:
    """Return the sections of a model from a run: training, data, metrics, versions, recipe."""
    assert info.run is not None
    assert info.store is not None
    assert info.step is not None
    record = read_record(info.store)
    data = record.data
    training = (
        f"Trained with `maestream {info.run.task}` for {plural(info.step, 'step')}, {plural(info.run.global_batch, 'image')} per "
        "step."
    )
    if isinstance(info.run, LinprobeConfig):
        training += " This is the frozen encoder, without the linear layer that was trained on it."
    dataset = (
        f"- dataset: {data['name']}, {plural(data['samples'], 'sample')}, {_labels(data, info)}\n"
        if data
        else ""
    )
    metrics = "\n".join(f"- {label}: {value}" for label, value in _metrics(info.store, info.step))
    newest = record.versions[max(record.versions)] if record.versions else {}
    versions = "\n".join(f"- {name} {version}" for name, version in newest.items())
    return "\n\n".join(
        [
            f"## Training\n\n{training}",
            f"## Data\n\n{dataset}- fingerprint: `{record.fingerprint}`",
            f"## Metrics\n\nAfter step {info.step:,} of run `{record.run_id}`:\n\n{metrics or '- none'}",
            f"## Versions\n\n{versions}",
            f"## Recipe\n\n```yaml\n{recipe_yaml(info.run)}```",
        ]
    )


def _labels(data: dict[str, Any], info: ModelInfo) -> str:
    """Return what the labels of the training dataset are, of RunRecord.data."""
    if info.labels and info.labels.kind == "numbers":
        return f"{plural(data['classes'], 'number')} per image"
    classes = plural(data["classes"], "class", "classes")
    return f"{classes}, {KIND_NAMES['classes']}" if info.labels else classes


def recipe_yaml(run: RunConfig) -> str:
    """Return the config as YAML, without the folders of its locations: the card is public."""
    return yaml.safe_dump(_without_folders(run.model_dump()), sort_keys=False, allow_unicode=True)


def _without_folders(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, str) and tree != SNAPSHOTS and (tree.startswith("/") or "://" in tree):
        return "…/" + tree.rstrip("/").rpartition("/")[2]
    return tree


def _describe_source(info: ModelInfo) -> str:
    """Return the section of a model without a run: what is known of its origin."""
    known = {SOURCE_LABELS.get(key, key): value for key, value in info.source.items() if value}
    lines = [
        f"- {label}: {'; '.join(map(str, value)) if isinstance(value, list) else value}"
        for label, value in known.items()
    ]
    return "## Source\n\n" + ("\n".join(lines) or "- unknown")


def _metrics(store: Store, step: int) -> Iterator[tuple[str, str]]:
    """Yield label and value of the newest metrics and evaluations that are not newer than `step` steps."""
    newest: dict[str, tuple[int, float]] = {}
    for row in history(store):
        for name in METRICS.keys() & row.keys():
            # k-NN runs in the background: its result is in a later row than its step's.
            at = int(row["knn_step"]) - 1 if name.startswith("knn_") else row["step"]
            if at < step and at >= newest.get(name, (-1, 0.0))[0]:
                newest[name] = at, row[name]
    for name, label in METRICS.items():
        if name in newest:
            at, value = newest[name]
            older = "" if at == step - 1 else f" (after step {at + 1:,})"
            yield label + older, f"{value:{MEASURES[name.rpartition('_')[2]].format}}"
    for file in store.names("evaluations"):
        if file.startswith(f"evaluations/step-{step:08d}-"):
            result = json.loads(store.read(file))
            for name in (name for name in found_measures(result, "val") if name in MAIN):
                measure, data = MEASURES[name], result["data"].rpartition("/")[2]
                unit = f",{measure.unit}" if measure.unit else ""
                yield f"{measure.label} on {data}{unit}", f"{result[f'val_{name}']:{measure.format}}"
