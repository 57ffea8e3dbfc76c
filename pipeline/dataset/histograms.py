"""Histograms of the image sizes of a dataset."""

import io

import numpy as np
from matplotlib.figure import Figure

from pipeline.dataset.dataset import Dataset
from pipeline.parallel import map_ahead

MAX_SHARDS = 256  # more are sampled evenly
BINS = 60


def draw_histograms(dataset: Dataset) -> bytes:
    """Return a PNG with histograms of width, height and file size, and the number of images per class."""
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
    counts = np.bincount(rows["label"][rows["label"] >= 0], minlength=len(dataset.manifest.classes))
    axes[3].step(np.arange(len(counts)), np.sort(counts)[::-1], where="mid")
    axes[3].set_ylim(bottom=0)
    axes[3].set_title("images per class, sorted" if len(counts) else "no labels")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
