"""Histograms of the image sizes of a dataset."""

import io

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import NO_LABEL
from pipeline.parallel import map_ahead

MAX_SHARDS = 256  # more are sampled evenly
BINS = 60


def draw_histograms(dataset: Dataset) -> bytes:
    """Return a PNG with histograms of width, height and file size, and the number of images per class, or of the labels that
    are numbers."""
    shards = np.unique(np.linspace(0, dataset.manifest.shards - 1, MAX_SHARDS).astype(np.int64)).tolist()
    rows = np.concatenate(list(map_ahead(dataset.index, shards)))
    figure = Figure(figsize=(12, 7), layout="constrained")
    part = "" if len(rows) == dataset.samples else f" of {dataset.samples:,}"
    figure.suptitle(f"{dataset.store.url}: {len(rows):,}{part} images")
    axes = figure.subplots(2, 2).ravel()
    for axis, values, title in [
        (axes[0], rows["width"], "width in pixels"),
        (axes[1], rows["height"], "height in pixels"),
        (axes[2], rows["size"] / 1000, "size in kB"),
    ]:
        # The largest 1 % would leave one bar for all others.
        limit = np.percentile(values, 99)
        above = int((values > limit).sum())
        axis.hist(values[values <= limit], bins=BINS)
        axis.axvline(float(np.median(values)), color="black", linewidth=1)
        axis.set_title(
            f"{title}: median {np.median(values):,.0f}, {above:,} above {limit:,.0f}, maximum {values.max():,.0f}"
        )
    _draw_labels(axes[3], dataset, rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _draw_labels(axis: Axes, dataset: Dataset, rows: npt.NDArray[np.void]) -> None:
    labels, classes = dataset.labels(rows), dataset.manifest.classes
    if dataset.manifest.labels == "numbers":
        axis.hist([column[~np.isnan(column)] for column in labels.T], bins=BINS, label=classes)
        axis.set_title("labels")
        return
    if dataset.manifest.labels == "classes":
        counts = np.nansum(labels, axis=0)
    else:
        counts = np.bincount(labels[labels != NO_LABEL], minlength=len(classes))
    axis.step(np.arange(len(counts)), np.sort(counts)[::-1], where="mid")
    axis.set_ylim(bottom=0)
    axis.set_title("images per class, sorted" if len(counts) else "no labels")
