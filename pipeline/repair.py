"""Mend a dataset of which the tars are whole: what they say is in the index, the table of shards and the manifest."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.ahead import Run
from pipeline.errors import UserError
from pipeline.manifest import (
    BUILDING,
    INDEX_SCHEMA,
    MANIFEST,
    NO_LABEL,
    SHARDS,
    SHARDS_SCHEMA,
    Dataset,
    Manifest,
    content_digest,
    fingerprint,
    index_name,
    open_dataset,
    to_parquet,
    write_dataset,
)
from pipeline.scan import scan_shard
from pipeline.storage import Store, open_shared, open_store
from pipeline.verify import Shard, damaged, shards_of


@dataclass
class Repaired:
    """What was mended, and what cannot be, a line each."""

    mended: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def repair(url: str, run: Run = map, on_shard: Callable[[], None] = lambda: None) -> Repaired:
    """Write damaged or missing indexes, the table of shards, and the manifest again, from what the tars say.

    A tar that is damaged has to be built again from its source: it is named, and nothing is made of it.
    """
    repaired = Repaired()
    store = open_store(url)
    try:
        dataset = open_dataset(url)
    except UserError as error:
        if store.exists(BUILDING):
            raise
        dataset = _repair_tables(store, run, repaired, str(error))
    for verified in damaged(dataset, run, on_shard):
        if not verified.tar_is_whole:
            again = f"has to be built again from {dataset.manifest.built.get('source') or 'its source'}"
            repaired.lost.append(f"{verified.problems[0]}; it {again}")
        elif verified.index_is_whole:
            repaired.lost += verified.problems
        else:
            shard = next(s for s in shards_of(dataset) if s.name == verified.name)
            _repair_index(shard, repaired)
    return repaired


def _repair_index(shard: Shard, repaired: Repaired) -> None:
    index, _ = _index_of_tar(open_store(shard.tars), shard.name, shard.checksums, shard.classes)
    if content_digest(index) != shard.content:
        repaired.lost.append(
            f"{index_name(shard.name)}: what the tar says is not what was written; `maestream shards index --overwrite` "
            "takes it as it is"
        )
        return
    open_store(shard.store).write(index_name(shard.name), to_parquet(index))
    repaired.mended.append(f"{index_name(shard.name)}: written again")


def _index_of_tar(store: Store, name: str, checksums: bool, classes: tuple[str, ...]) -> tuple[pa.Table, str]:
    """Index (INDEX_SCHEMA) and sha256 of a tar. UserError where it is damaged."""
    scan = scan_shard(store, name, checksums, skip_damaged=False)
    code = {name: label for label, name in enumerate(classes)}
    labels = []
    for text in scan.rows["label"].to_pylist():
        if text and not text.isdigit() and text not in code:
            raise UserError(
                f"{store.describe(name)}: its label {text} is the name of a class, and what numbered them is gone: "
                "`maestream shards index --overwrite` numbers them again"
            )
        labels.append(NO_LABEL if not text else int(text) if text.isdigit() else code[text])
    place = scan.rows.column_names.index("label")
    rows = scan.rows.set_column(place, "label", pa.array(labels, pa.int32()))
    return rows.cast(INDEX_SCHEMA), scan.sha256


def _repair_tables(store: Store, run: Run, repaired: Repaired, problem: str) -> Dataset:
    """Write the table of shards, and the manifest if that is damaged too, from tars named as ours are."""
    names = [n for n in store.names() if "/" not in n and n.startswith("shard-") and n.endswith(".tar")]
    if not names:
        raise UserError(f"{problem}; and it has no shard-*.tar from which it could be mended")
    try:
        before = Manifest.model_validate_json(store.read(MANIFEST))
    except (FileNotFoundError, ValueError):
        before = None
    checksums = before is None or before.checksums
    classes = tuple(before.classes) if before else ()
    rows = sorted(
        run(_row_of, [_Tar(store.url, name, checksums, classes) for name in names]),
        key=lambda row: str(row["name"]),
    )
    table = pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA)
    if before is not None:
        if fingerprint([table["content"].combine_chunks()]) != before.fingerprint:
            raise UserError(
                f"{store.url}: the {len(names)} tars there are not those that were written, as {MANIFEST} tells: some are "
                "missing, damaged, or of another dataset. Build it again from its source"
            )
        store.write(SHARDS, to_parquet(table))
        repaired.mended.append(f"{SHARDS}: written again, and it is as it was")
    else:
        image_bytes = sum(row["image_bytes"] for row in rows)
        write_dataset(
            store, table, image_bytes, _classes_of(rows), {"source": "repaired: what its tars told"}
        )
        repaired.mended.append(
            f"{MANIFEST}, {SHARDS}: written again from {len(names)} tars; whether tars are missing cannot be known, class "
            "names are those of the keys' folders"
        )
    return open_dataset(store.url)  # its indexes are looked at next


def _classes_of(rows: list[dict[str, Any]]) -> list[str]:
    """The folder of each label's keys, if each has one of its own, in order; else numbers."""
    folders: dict[int, set[str]] = {}
    for row in rows:
        for label, names in row["folders"].items():
            folders.setdefault(label, set()).update(names)
    count = max(folders, default=-1) + 1
    own = [min(folders.get(label, {""})) for label in range(count)]
    if all(len(names) == 1 for names in folders.values()) and "" not in own and own == sorted(set(own)):
        return own
    return [str(label) for label in range(count)]


@dataclass(frozen=True)
class _Tar:
    """What a task is given."""

    url: str
    name: str
    checksums: bool
    classes: tuple[str, ...]


def _row_of(tar: _Tar) -> dict[str, Any]:
    """The row of a tar in the table of shards, and its labels' folders. UserError where it is damaged."""
    store = open_shared(tar.url, tar.name)
    index, sha256 = _index_of_tar(store, tar.name, tar.checksums, tar.classes)
    folders: dict[int, set[str]] = {}
    for label, key in zip(index["label"].to_pylist(), index["key"].to_pylist(), strict=True):
        if label != NO_LABEL:
            folder, slash, _ = key.partition("/")
            folders.setdefault(label, set()).add(folder if slash else "")
    return {
        "name": tar.name,
        "samples": len(index),
        "bytes": store.size(tar.name),
        "sha256": sha256,
        "content": content_digest(index),
        "image_bytes": sum(index["size"].to_pylist()),
        "folders": folders,
    }
