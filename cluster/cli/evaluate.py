"""`maestream evaluate`, `knn` and `features`: evaluate an encoder or export its features, in parallel Ray tasks."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from cluster.cli.options import NumberRange, anonymous_option, image_size_option, step_option
from cluster.terminal.console import console, progress_counter
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.errors import UserError
from pipeline.storage.store import Store, open_store
from pipeline.text import plural
from trainer.evaluate.inference_shard import FEATURES, InferenceShard
from trainer.labels.measures import describe

if TYPE_CHECKING:
    from trainer.labels.labels import Labels

TASK_SAMPLES = 4096  # at most, per Ray task
TASK_FEATURE_BYTES = 2**28  # at most, per Ray task

crop_option = click.option(
    "--crop",
    type=NumberRange(min=0, max=1, min_open=True),
    metavar="FRACTION",
    help="Side of the centre crop, relative to the shorter side of the image.  [default: as in training, or 224/256]",
)
batch_option = click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    default=128,
    show_default=True,
    help="Images per batch.",
)
tasks_option = click.option(
    "--tasks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of parallel tasks.  [default: one per GPU, or one per CPU core without a GPU]",
)
pool_option = click.option(
    "--pool",
    type=click.Choice(["class", "mean", "patches"]),
    default="class",
    show_default=True,
    help="Feature of an image: the class token, the mean over its patches, or all patches.",
)


def _make_template(run: str, step: int | None, crop: float | None, **options: Any) -> InferenceShard:
    """Return the job that all tasks of a command share, without a dataset and its range of samples."""
    from trainer.config.model_schema import ClassifierConfig
    from trainer.models.pixels import describe_normalisation
    from trainer.weights.pretrained import read_model_info
    from trainer.weights.resize import resize_config

    info = read_model_info(run, step)
    assert info.store is not None
    if isinstance(info.model, ClassifierConfig) and options.get("pool", "class") != "class":
        raise UserError(
            f"--pool {options['pool']}: a fine-tuned model has no other features than those that its head uses; omit --pool"
        )
    if size := options.get("size"):  # raises UserError, before anything is written
        resize_config(info.model, size, "--image-size")
    console.print(describe_normalisation(info.model))
    return InferenceShard(
        info.store.url, info.step, data="", first=0, last=0, crop=crop or info.crop, **options
    )


def _open_data(url: str, job: InferenceShard) -> Dataset:
    """Open a dataset. Raise UserError if the model cannot take its images."""
    from trainer.models.pixels import check_pixels
    from trainer.weights.pretrained import read_model_info

    dataset = open_dataset(url)
    check_pixels(read_model_info(job.run, job.step).model, dataset)
    return dataset


def _label(job: InferenceShard) -> str:
    return f"step {job.step}" if job.step else job.run


def _check_labels(job: InferenceShard, dataset: Dataset) -> "Labels":
    """Return what the model was trained on.

    Raises UserError unless the dataset has the same kind of labels, and the same classes in the same order.
    """
    from trainer.config.model_schema import ClassifierConfig
    from trainer.labels.labels import KIND_NAMES, Labels, check_evaluable
    from trainer.run.run import check_trained_labels
    from trainer.weights.pretrained import read_model_info

    info, kind = read_model_info(job.run, job.step), dataset.manifest.labels
    # Foreign weights do not tell whether their logits are of one class or of several.
    several = info.run is None and kind == "classes"
    default = Labels(kind="classes" if several else "class", outputs=len(dataset.manifest.classes))
    labels = info.labels or default
    if info.run:
        check_trained_labels(open_store(job.run), dataset)
    elif not isinstance(info.model, ClassifierConfig):
        raise UserError(
            f"{job.run} is an encoder without class names: fine-tune or probe it first, or use `maestream knn`"
        )
    elif kind != labels.kind:
        raise UserError(
            f"{dataset.store.url} has another kind of labels ({KIND_NAMES[kind]}) than {job.run} predicts "
            f"({KIND_NAMES[labels.kind]})"
        )
    elif info.classes not in (dataset.manifest.classes, len(dataset.manifest.classes)):
        raise UserError(f"{dataset.store.url} and {job.run} do not have the same classes in the same order")
    check_evaluable(dataset, labels)
    return labels


def _split(dataset: Dataset, template: InferenceShard, samples: int) -> Iterator[InferenceShard]:
    """Yield jobs of so many samples each that cover the dataset."""
    for first in range(0, dataset.samples, samples):
        last = min(first + samples, dataset.samples)
        yield replace(template, data=dataset.store.url, first=first, last=last)


@click.command()
@click.argument("run")
@click.option(
    "--data", required=True, metavar="DATASET", help="Dataset to evaluate on, with the classes of training."
)
@step_option
@crop_option
@batch_option
@tasks_option
@anonymous_option("data", "the dataset of --data")
def evaluate(run: str, data: str, step: int | None, tasks: int | None, **options: Any) -> None:
    """Measure a model on a dataset with labels.

    RUN is a run of finetune or linprobe, or an imported classifier. Each image of the dataset counts exactly once. The result
    is also written to RUN/evaluations/.

    \b
    labels            metrics
    one class         top-1 and top-5 accuracy; images that cannot be read count as wrong
    several classes   mAP: the mean of the average precision over all classes that an image has
    numbers           R², and the mean absolute error in the units of the labels; of several
                      numbers per image, the mean of theirs

    mAP, R² and the error leave out images that cannot be read, and say how many these are.
    """
    job = _make_template(run, step, **options)
    dataset = _open_data(data, job)
    store = open_store(run)
    labels = _check_labels(job, dataset)
    measure = _measure_classes if labels.kind == "class" else _measure_predictions
    result: dict[str, Any] = measure(job, dataset, labels, tasks)
    name = f"evaluations/step-{job.step or 0:08d}-{dataset.fingerprint[:12]}-crop-{job.crop:g}.json"
    result |= {"step": job.step, "data": dataset.store.url, "crop": job.crop}
    store.write(name, (json.dumps(result, indent=1) + "\n").encode())
    console.print(
        f"{_label(job)}: {describe(result, 'val')}, {plural(dataset.samples, 'image')}, {result['val_bad']:.0f} of them bad"
    )


def _measure_classes(
    job: InferenceShard, dataset: Dataset, labels: "Labels", tasks: int | None
) -> dict[str, float]:
    """Measure a classifier of one class per image."""
    from cluster.runtime.task_pool import task_pool
    from trainer.evaluate.accuracy import SUM_COLUMNS, metrics_from_sums
    from trainer.evaluate.features import evaluate_shard

    sums = np.zeros(len(SUM_COLUMNS))
    with (
        task_pool(tasks, runs_model=True) as run_tasks,
        progress_counter("images", dataset.samples) as advance,
    ):
        for shard_sums in run_tasks(evaluate_shard, _split(dataset, job, TASK_SAMPLES)):
            sums += shard_sums
            advance(int(shard_sums[0]))  # samples
    return metrics_from_sums(sums.tolist(), dataset)


def _measure_predictions(
    job: InferenceShard, dataset: Dataset, labels: "Labels", tasks: int | None
) -> dict[str, float]:
    """Measure a model for several classes or numbers. All predictions are kept in memory: 8 bytes per image and class."""
    from cluster.runtime.task_pool import task_pool
    from trainer.evaluate.features import predict_shard
    from trainer.evaluate.predictions import join, score
    from trainer.run.worker import Worker

    parts = {}
    with (
        task_pool(tasks, runs_model=True) as run_tasks,
        progress_counter("images", dataset.samples) as advance,
    ):
        for shard, predictions in run_tasks(predict_shard, _split(dataset, job, TASK_SAMPLES)):
            parts[shard.first] = predictions
            advance(shard.last - shard.first)
    return score(join([parts[first] for first in sorted(parts)]), labels, dataset, Worker())


@click.command()
@click.argument("run")
@click.option("--data", required=True, metavar="DATASET", help="Dataset to read.")
@click.option(
    "--out",
    required=True,
    metavar="FOLDER",
    help="Folder for the Parquet files, with columns sample, key, label and feature.",
)
@step_option
@pool_option
@image_size_option
@crop_option
@batch_option
@tasks_option
@anonymous_option("data", "the dataset of --data")
def features(run: str, data: str, out: str, step: int | None, tasks: int | None, **options: Any) -> None:
    """Write an encoder's features of all images to Parquet files.

    Images that cannot be read are skipped. Run the same command again to resume.
    """
    from cluster.runtime.task_pool import task_pool
    from trainer.evaluate.features import write_features

    template = replace(_make_template(run, step, **options), out=open_store(out).url)
    dataset = _open_data(data, template)
    samples = _samples_per_task(template)
    _write_description(open_store(out), template, dataset, samples)
    rows = 0
    with (
        task_pool(tasks, runs_model=True) as run_tasks,
        progress_counter("images", dataset.samples) as advance,
    ):
        for job, good in run_tasks(write_features, _split(dataset, template, samples)):
            rows += good
            advance(job.last - job.first)
    bad = plural(dataset.samples - rows, "bad image")
    console.print(f"{_label(template)}: wrote features of {plural(rows, 'image')} to {out}, skipped {bad}")


def _samples_per_task(job: InferenceShard) -> int:
    """Return the number of samples whose features fit into TASK_FEATURE_BYTES, at most TASK_SAMPLES."""
    from trainer.weights.pretrained import read_model_info

    model = read_model_info(job.run, job.step).model
    height, width = job.size or model.size
    vectors = (height // model.patch_size) * (width // model.patch_size) if job.pool == "patches" else 1
    return min(TASK_SAMPLES, max(TASK_FEATURE_BYTES // (vectors * model.width * 4), 1))


def _write_description(store: Store, template: InferenceShard, dataset: Dataset, samples: int) -> None:
    """Write to the output folder how its features are made. Raise UserError if it has features of other settings."""
    settings = {
        **asdict(template),
        "data": dataset.fingerprint,
        "samples": dataset.samples,
        "samples_a_part": samples,
    }
    for name in ("first", "last", "out", "batch"):
        del settings[name]
    settings = json.loads(json.dumps(settings))  # tuples become lists
    try:
        existing = json.loads(store.read(FEATURES))
    except FileNotFoundError:
        if names := store.names():
            raise UserError(f"{store.url} is not empty ({names[0]}, …): choose another --out") from None
        store.write(FEATURES, (json.dumps(settings, indent=1) + "\n").encode())
        return
    if changed := [
        f"{name} {existing.get(name)} → {value}"
        for name, value in settings.items()
        if existing.get(name) != value
    ]:
        raise UserError(
            f"{store.url} already has features with other settings ({'; '.join(changed)}): choose another --out"
        )


@click.command()
@click.argument("run")
@click.option("--data", required=True, metavar="DATASET", help="Reference dataset: its labels are used.")
@click.option(
    "--val",
    required=True,
    metavar="DATASET",
    help="Dataset to predict labels of, with the same kind of labels and classes.",
)
@click.option(
    "--neighbours",
    type=click.IntRange(min=1),
    metavar="K",
    default=20,
    show_default=True,
    help="Number of nearest neighbours.",
)
@step_option
@click.option(
    "--pool",
    type=click.Choice(["class", "mean"]),
    default="class",
    show_default=True,
    help="Feature of an image: the class token, or the mean over its patches.",
)
@crop_option
@batch_option
@tasks_option
def knn(
    run: str, data: str, val: str, neighbours: int, step: int | None, tasks: int | None, **options: Any
) -> None:
    """Evaluate an encoder by its k nearest neighbours.

    Nothing is trained. Each image of --val gets the class that its nearest neighbours in --data vote for, weighted by the
    cosine similarity of their features. For labels of several classes, a class's score is its share of the votes (measured by
    mAP); for numbers, the prediction is the weighted mean (R² and mean absolute error). All features are kept in memory: about
    4 GB for ImageNet and a ViT-B.
    """
    from cluster.runtime.task_pool import task_pool
    from trainer.evaluate.features import extract_features
    from trainer.labels.labels import check_val

    template = _make_template(run, step, **options)
    bank, queries = _open_data(data, template), _open_data(val, template)
    check_val(bank, queries)
    features_and_labels = []
    with task_pool(tasks, runs_model=True) as run_tasks:
        for name, dataset in (("reference images", bank), ("query images", queries)):
            with progress_counter(name, dataset.samples) as advance:
                tables = {}
                for job, table in run_tasks(extract_features, _split(dataset, template, TASK_SAMPLES)):
                    tables[job.first] = table
                    advance(job.last - job.first)
            features_and_labels.append(_as_tensors([tables[first] for first in sorted(tables)], dataset))
    (reference, reference_labels), (query, query_labels) = features_and_labels
    result = _measure_neighbours(query, query_labels, reference, reference_labels, neighbours, queries)
    # Images that cannot be read have no features. They count as wrong classes; other measures leave them out.
    bad = queries.samples - len(query)
    left_out = f", {plural(bad, 'bad image')} left out" if bad and queries.manifest.labels != "class" else ""
    console.print(
        f"{_label(template)}: {describe(result, 'knn')} with {plural(neighbours, 'nearest neighbour')}, "
        f"{plural(queries.samples, 'image')} against {len(reference):,}{left_out}"
    )


def _measure_neighbours(
    query: Any, query_labels: Any, reference: Any, reference_labels: Any, neighbours: int, queries: Dataset
) -> dict[str, float]:
    """Predict the labels of the readable query images by nearest neighbours, and measure the predictions."""
    from trainer.evaluate.knn import knn_means, knn_votes
    from trainer.labels.scores import mean_average_precision, r2_and_mae

    kind, classes = queries.manifest.labels, len(queries.manifest.classes)
    if kind == "class":
        votes = knn_votes(query, reference, reference_labels, classes, neighbours)
        best = votes.topk(min(5, classes), dim=1).indices
        correct = best == query_labels[:, None]
        hits = {"knn_top1": correct[:, 0], "knn_top5": correct.any(dim=1)}
        return {name: 100 * hit.sum().item() / queries.samples for name, hit in hits.items()}
    predicted = knn_means(query, reference, reference_labels, neighbours).numpy()
    actual = query_labels.double().numpy()
    if kind == "classes":
        return {"knn_map": mean_average_precision(predicted, actual)}
    return dict(zip(("knn_r2", "knn_mae"), r2_and_mae(predicted, actual), strict=True))


def _as_tensors(tables: list[Any], dataset: Dataset) -> tuple[Any, Any]:
    """Return features, float32[n, width], and labels as in a batch. Raise UserError if a sample has no label."""
    import pyarrow as pa
    import torch

    from trainer.evaluate.accuracy import has_unlabelled
    from trainer.evaluate.features import labels_from_column
    from trainer.labels.labels import REMEDY

    column = pa.chunked_array([chunk for table in tables for chunk in table["label"].chunks])
    labels = labels_from_column(column, dataset.manifest.labels, len(dataset.manifest.classes))
    if has_unlabelled(labels):
        raise UserError(f"{dataset.store.url} has samples without a label, which knn needs: {REMEDY}")
    columns = [table["feature"].combine_chunks() for table in tables]
    vectors = [column.flatten().to_numpy().reshape(len(column), -1) for column in columns]
    return torch.from_numpy(np.concatenate(vectors)), labels
