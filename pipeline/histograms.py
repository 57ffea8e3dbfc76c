"""How large the images of a dataset are, at one look."""

import io

import numpy as np
from matplotlib.figure import Figure

from pipeline.ahead import map_ahead
from pipeline.manifest import Dataset

MOST_SHARDS = 256  # are looked at, spread evenly
BINS = 60


def draw_histograms(dataset: Dataset) -> bytes:
    """PNG with histograms of width, height, bytes, and images a class."""
    shards = np.unique(np.linspace(0, dataset.manifest.shards - 1, MOST_SHARDS).astype(np.int64)).tolist()
    rows = np.concatenate(list(map_ahead(dataset.index, shards)))
    figure = Figure(figsize=(12, 7), layout="constrained")
    part = "" if len(rows) == dataset.samples else f" of {dataset.samples:,}"
    figure.suptitle(f"{dataset.store.url}: {len(rows):,}{part} images")
    axes = figure.subplots(2, 2).ravel()
    for axis, values, title in [
        (axes[0], rows["width"], "width, pixels"),
        (axes[1], rows["height"], "height, pixels"),
        (axes[2], rows["size"] / 1000, "kilobytes"),
    ]:
        # The largest hundredth would squeeze all the others into one bar.
        most = np.percentile(values, 99)
        above = int((values > most).sum())
        axis.hist(values[values <= most], bins=BINS)
        axis.axvline(float(np.median(values)), color="black", linewidth=1)
        axis.set_title(
            f"{title}: median {np.median(values):,.0f}, {above:,} above {most:,.0f}, up to {values.max():,.0f}"
        )
    counts = np.bincount(rows["label"][rows["label"] >= 0], minlength=len(dataset.manifest.classes))
    axes[3].step(np.arange(len(counts)), np.sort(counts)[::-1], where="mid")
    axes[3].set_ylim(bottom=0)
    axes[3].set_title("images a class, most first" if len(counts) else "no labels")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
