"""What a run's checkpoints are worth: `maestream evaluate`, `knn` and `features`, as Ray tasks over parts of a dataset."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import click
import numpy as np

from cluster.terminal import console, counting
from pipeline.errors import UserError
from pipeline.manifest import NO_LABEL, Dataset, open_dataset
from pipeline.storage import Store, open_store
from trainer.part import FEATURES, Part

PART_SAMPLES = 4096  # of a task, at most
PART_BYTES = 2**28  # of features of a task, at most

of_step = click.option("--step", type=click.IntRange(min=1), help="Of the commit; the newest without it.")
of_crop = click.option(
    "--crop",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Side of the centred square over the shorter side.  [default: as in training, or 224/256]",
)
of_batch = click.option(
    "--batch", type=click.IntRange(min=1), default=128, show_default=True, help="Images at once."
)
of_tasks = click.option(
    "--tasks", type=click.IntRange(min=1), help="Parts at once.  [default: one a GPU, or a core]"
)
of_pool = click.option(
    "--pool",
    type=click.Choice(["class", "mean", "patches"]),
    default="class",
    show_default=True,
    help="Features: the class token, the mean of the patches, or all patches.",
)
of_size = click.option(
    "--image-size",
    "size",
    callback=lambda context, option, text: _size(text),
    metavar="N|HxW",
    help="Of other images than it was trained on: positions are interpolated.",
)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not height.isdigit() or not (width or height).isdigit():
        raise UserError(f"--image-size {text}: write 384, or 384x512 for height and width")
    return int(height), int(width or height)


def _about(run: str, step: int | None, crop: float | None, **how: Any) -> Part:
    """What all parts have in common."""
    from trainer.config import ClassifierConfig
    from trainer.pretrained import describe, resized_model

    about = describe(run, step)
    assert about.store is not None
    if isinstance(about.model, ClassifierConfig) and how.get("pool", "class") != "class":
        raise UserError("--pool: the features of a fine-tuned encoder are what its head reads")
    if size := how.get("size"):  # before anything is written
        resized_model(about.model, size, "--image-size")
    return Part(about.store.url, about.step, data="", first=0, last=0, crop=crop or about.crop, **how)


def _said(about: Part) -> str:
    return f"step {about.step}" if about.step else about.run


def _check_classes(about: Part, dataset: Dataset) -> None:
    """UserError where a dataset has other classes than a model names, or has them in another order."""
    from trainer.config import ClassifierConfig
    from trainer.pretrained import describe
    from trainer.run import check_trained_classes

    model = describe(about.run, about.step)
    if model.run:
        check_trained_classes(open_store(about.run), dataset)
    elif not isinstance(model.model, ClassifierConfig):
        raise UserError(
            f"{about.run} is an encoder, and names no classes: fine-tune or probe it, or try `maestream knn`"
        )
    elif model.classes not in (dataset.manifest.classes, len(dataset.manifest.classes)):
        raise UserError(
            f"{dataset.store.url} has other classes than {about.run} names, or has them in another order"
        )


def parts_of(dataset: Dataset, about: Part, samples: int) -> Iterator[Part]:
    """All of a dataset, so many samples a part."""
    for first in range(0, dataset.samples, samples):
        last = min(first + samples, dataset.samples)
        yield replace(about, data=dataset.store.url, first=first, last=last)


@click.command()
@click.argument("run")
@click.option("--data", required=True, help="The dataset, with the classes that it was trained on.")
@of_step
@of_crop
@of_batch
@of_tasks
def evaluate(run: str, data: str, step: int | None, tasks: int | None, **how: Any) -> None:
    """How often a fine-tuned or probed encoder is right: top-1 and top-5, every sample exactly once."""
    from cluster.sharding import ray_tasks
    from trainer.evaluate import COLUMNS, described
    from trainer.features import answers_of

    about, dataset = _about(run, step, **how), open_dataset(data)
    store = open_store(run)
    _check_classes(about, dataset)
    sums = np.zeros(len(COLUMNS))
    with ray_tasks(tasks, models=True) as do, counting("images", dataset.samples) as more:
        for part in do(answers_of, parts_of(dataset, about, PART_SAMPLES)):
            sums += part
            more(int(part[0]))
    result: dict[str, Any] = described(sums.tolist(), dataset)
    name = f"evaluations/step-{about.step or 0:08d}-{dataset.fingerprint[:12]}-crop-{about.crop:g}.json"
    result |= {"step": about.step, "data": dataset.store.url, "crop": about.crop}
    store.write(name, (json.dumps(result, indent=1) + "\n").encode())
    console.print(
        f"{_said(about)}: top-1 {result['val_top1']:.2f} %, top-5 {result['val_top5']:.2f} %, loss "
        f"{result['val_loss']:.4f}, {dataset.samples:,} images, {result['val_bad']:.0f} of them bad"
    )


@click.command()
@click.argument("run")
@click.option("--data", required=True, help="The dataset.")
@click.option("--out", required=True, help="Folder for Parquet files: sample, key, label, feature.")
@of_step
@of_pool
@of_size
@of_crop
@of_batch
@of_tasks
def features(run: str, data: str, out: str, step: int | None, tasks: int | None, **how: Any) -> None:
    """What an encoder says of each image of a dataset, for other people's heads. The same command again goes on."""
    from cluster.sharding import ray_tasks
    from trainer.features import write_features

    about, dataset = replace(_about(run, step, **how), out=open_store(out).url), open_dataset(data)
    samples = _samples_a_part(about)
    _describe_features(open_store(out), about, dataset, samples)
    rows = 0
    with ray_tasks(tasks, models=True) as do, counting("images", dataset.samples) as more:
        for part, good in do(write_features, parts_of(dataset, about, samples)):
            rows += good
            more(part.last - part.first)
    bad = dataset.samples - rows
    console.print(f"{_said(about)}: features of {rows:,} images, {bad} are bad → {out}")


def _samples_a_part(about: Part) -> int:
    """So many that their features fit into PART_BYTES."""
    from trainer.pretrained import describe

    model = describe(about.run, about.step).model
    height, width = about.size or model.size
    vectors = (height // model.patch_size) * (width // model.patch_size) if about.pool == "patches" else 1
    return min(PART_SAMPLES, max(PART_BYTES // (vectors * model.width * 4), 1))


def _describe_features(store: Store, about: Part, dataset: Dataset, samples: int) -> None:
    """Write down what the features of a folder are. UserError where it has others already."""
    ours = {
        **asdict(about),
        "data": dataset.fingerprint,
        "samples": dataset.samples,
        "samples_a_part": samples,
    }
    for name in ("first", "last", "out", "batch"):
        del ours[name]
    ours = json.loads(json.dumps(ours))
    try:
        there = json.loads(store.read(FEATURES))
    except FileNotFoundError:
        if names := store.names():
            raise UserError(f"{store.url} is not empty ({names[0]}, …): choose another --out") from None
        store.write(FEATURES, (json.dumps(ours, indent=1) + "\n").encode())
        return
    if changed := [
        f"{name} {there.get(name)} → {ours[name]}" for name in ours if there.get(name) != ours[name]
    ]:
        raise UserError(f"{store.url} has other features ({'; '.join(changed)}): choose another --out")


@click.command()
@click.argument("run")
@click.option("--data", required=True, help="The dataset whose labels are known.")
@click.option("--val", required=True, help="The dataset that is asked about, with the same classes.")
@click.option("--neighbours", type=click.IntRange(min=1), default=20, show_default=True)
@of_step
@click.option(
    "--pool",
    type=click.Choice(["class", "mean"]),
    default="class",
    show_default=True,
    help="Features: the class token, or the mean of the patches.",
)
@of_crop
@of_batch
@of_tasks
def knn(
    run: str, data: str, val: str, neighbours: int, step: int | None, tasks: int | None, **how: Any
) -> None:
    """What an encoder is worth without training anything: the classes of the nearest images, by cosine, weighted.

    The features of all images are kept in memory: 4 GB for ImageNet and a ViT-B."""
    from cluster.sharding import ray_tasks
    from trainer.evaluate import check_classes
    from trainer.features import features_of
    from trainer.knn import neighbours_vote

    about = _about(run, step, **how)
    bank, queries = open_dataset(data), open_dataset(val)
    classes = check_classes(bank, queries)
    found = []
    with ray_tasks(tasks, models=True) as do:
        for name, dataset in (("known images", bank), ("images asked about", queries)):
            with counting(name, dataset.samples) as more:
                tables = {}
                for part, table in do(features_of, parts_of(dataset, about, PART_SAMPLES)):
                    tables[part.first] = table
                    more(part.last - part.first)
            found.append(_as_tensors([tables[first] for first in sorted(tables)], dataset))
    (known, known_labels), (unknown, labels) = found
    votes = neighbours_vote(unknown, known, known_labels, classes, neighbours)
    best = votes.topk(min(5, classes), dim=1).indices
    right = best == labels[:, None]
    # What cannot be read counts as wrong.
    top1, top5 = (100 * hits.sum().item() / queries.samples for hits in (right[:, 0], right.any(dim=1)))
    console.print(
        f"{_said(about)}: {neighbours} nearest neighbours: top-1 {top1:.2f} %, top-5 {top5:.2f} %, "
        f"{queries.samples:,} images by {len(known):,}"
    )


def _as_tensors(tables: list[Any], dataset: Dataset) -> tuple[Any, Any]:
    """Features float32[n, width] and labels int64[n]. UserError where one has none."""
    import torch

    labels = np.concatenate([table["label"].to_numpy() for table in tables]).astype(np.int64)
    if (labels == NO_LABEL).any():
        raise UserError(f"{dataset.store.url} has samples without a label")
    parts = [table["feature"].combine_chunks() for table in tables]
    vectors = [part.flatten().to_numpy().reshape(len(part), -1) for part in parts]
    return torch.from_numpy(np.concatenate(vectors)), torch.from_numpy(labels)
