"""Datasets whose labels are several classes, or numbers: stored, loaded, verified and repaired."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.fields import Fields
from pipeline.dataset.histograms import draw_histograms
from pipeline.dataset.manifest import NO_LABEL, LabelKind, content_digest
from pipeline.dataset.repair import repair
from pipeline.dataset.verify import verify
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.loading.loader import Batch, Loader, centred_batch
from pipeline.loading.order import Order
from pipeline.pictures.contact_sheet import draw_contact_sheet
from tests.support.data.foreign_tars import index, noise, pack

NAN = float("nan")
LABELS: dict[LabelKind, list[object]] = {
    "class": [1, 0, 2.0, 1, None, 2],
    "classes": [[0, 9], [], 3, [11, 0, 3], None, [10]],
    "numbers": [[0.5, 2], [1, -1], [3, 4], [1e-3, 0], None, [7, 8]],
}
EXPECTED = {
    "class": [1, 0, 2, 1, NO_LABEL, 2],
    "classes": [[float(i in on) for i in range(12)] for on in ({0, 9}, {}, {3}, {0, 3, 11})]
    + [[NAN] * 12, [float(i == 10) for i in range(12)]],
    "numbers": [[0.5, 2], [1, -1], [3, 4], [1e-3, 0], [NAN, NAN], [7, 8]],
}


def labelled(folder: Path, labels: list[object], **options: object) -> Dataset:
    """A dataset of two tars."""
    half = len(labels) // 2
    for part, values in enumerate((labels[:half], labels[half:])):
        files = {}
        for i, label in enumerate(values):
            files |= {
                f"{part}-{i}.jpg": noise(i, 40),
                f"{part}-{i}.json": json.dumps({"label": label}).encode(),
            }
        pack(folder / f"{part}.tar", files)
    index(folder, checksums=True, overwrite=True, **options)
    return open_dataset(str(folder))


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_stored_loaded_verified_and_repaired(tmp_path: Path, kind: LabelKind) -> None:
    dataset = labelled(tmp_path, LABELS[kind])
    assert dataset.manifest.labels == kind
    assert dataset.manifest.format_version == (1 if kind == "class" else 2)
    expected = torch.tensor(EXPECTED[kind], dtype=torch.int64 if kind == "class" else torch.float32)

    def check(batch: Batch) -> None:
        assert batch.labels.dtype == expected.dtype
        torch.testing.assert_close(batch.labels, expected[batch.sample_ids], rtol=0, atol=0, equal_nan=True)

    decoder = make_decoder("cpu", 16, threads=1)
    check(centred_batch(dataset, decoder, np.arange(6)))
    loader = Loader(dataset, Order(dataset.shard_samples, 0, 2, 2, 2), decoder, 0, 1)
    for batch in loader.steps(0, 3):
        check(batch)
    loader.close()
    assert verify(dataset) == []
    paths = [tmp_path / "index/0.parquet", tmp_path / "index/1.parquet"]
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    assert len(repair(str(tmp_path)).repaired) == 2
    assert [path.read_bytes() for path in paths] == before
    assert draw_contact_sheet(dataset)
    assert draw_histograms(dataset)


def test_the_digest_covers_lists(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, LABELS["classes"])
    changed = labelled(tmp_path, [[0, 8], *LABELS["classes"][1:]])
    assert changed.fingerprint != dataset.fingerprint
    assert content_digest(changed.read_index_table(1)) == dataset.shard_content[1].as_py()


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_an_index_with_labels_that_the_manifest_does_not_have_is_damaged(
    tmp_path: Path, kind: LabelKind
) -> None:
    labelled(tmp_path, LABELS[kind])
    path = tmp_path / "index/0.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("label")
    lists = table["label"].to_pylist()
    lists[0] = [12] if kind == "classes" else [1.0]
    pq.write_table(table.set_column(place, "label", [lists]), path)
    with pytest.raises(
        UserError, match=r"index/0\.parquet is damaged \(it has labels that the manifest does not have"
    ):
        open_dataset(str(tmp_path)).locate([0])


def test_flags_and_the_users_kind_are_repaired_too(tmp_path: Path) -> None:
    for labels, options in (
        ([[0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 0, 0]], {}),
        (["1 4", "2", "0", "3"], {"fields": Fields(kind="classes")}),
        (["1 4", 2, 0.5, 3], {"fields": Fields(kind="class")}),
    ):
        labelled(tmp_path, labels, **options)
        path = tmp_path / "index/0.parquet"
        before = path.read_bytes()
        path.unlink()
        assert repair(str(tmp_path)).unrepaired == []
        assert path.read_bytes() == before
