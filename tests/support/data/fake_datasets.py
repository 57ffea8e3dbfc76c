"""Datasets with indexes but without images: fast to write, for tests that read no pixels."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import INDEX_SCHEMA, SHARDS_SCHEMA, content_digest, index_name, write_dataset
from pipeline.storage.parquet import to_parquet
from pipeline.storage.store import open_store


def write_fake(
    folder: Path, shards: list[list[dict[str, Any]]], classes: list[str], tar_bytes: int = 1 << 20
) -> Dataset:
    """A dataset whose shards have these rows: "key", and any of the index's columns and others. The tars are empty files."""
    store, table, total = open_store(str(folder)), [], 0
    for number, rows in enumerate(shards):
        defaults = {"size": 100, "label": -1, "width": 10, "height": 10, "crc32c": 0}
        filled = [{"offset": 512 + 1024 * i, **defaults, **row} for i, row in enumerate(rows)]
        index = pa.Table.from_pylist(filled)
        for place, name in enumerate(index.column_names):
            if name in INDEX_SCHEMA.names:
                index = index.set_column(place, name, index[name].cast(INDEX_SCHEMA.field(name).type))
        name = f"shard-{number:06d}.tar"
        store.write(name, b"")
        store.write(index_name(name), to_parquet(index))
        row = {"name": name, "samples": len(rows), "bytes": tar_bytes, "sha256": ""}
        table.append({**row, "content": content_digest(index)})
        total += sum(row["size"] for row in filled)
    write_dataset(store, pa.Table.from_pylist(table, SHARDS_SCHEMA), total, classes, {}, checksums=False)
    return open_dataset(str(folder))
