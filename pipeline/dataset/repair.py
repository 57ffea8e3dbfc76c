"""Repair a dataset whose tars are intact: rebuild damaged indexes, the table of shards and the manifest from them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.index import fields_of, index_table
from pipeline.dataset.labels import LabelEncoder
from pipeline.dataset.manifest import (
    BUILDING,
    MANIFEST,
    NO_LABEL,
    SHARDS,
    SHARDS_SCHEMA,
    Manifest,
    content_digest,
    fingerprint,
    index_name,
    write_dataset,
)
from pipeline.dataset.verify import VerifyJob, find_damage, verify_jobs
from pipeline.dataset.webdataset import ScannedShard, ScanOptions, image_kinds, scan_shard
from pipeline.errors import UserError
from pipeline.images.kinds import ImageKinds
from pipeline.parallel import ParallelMap
from pipeline.storage.mounts import open_tars
from pipeline.storage.parquet import to_parquet
from pipeline.storage.store import Store, open_shared, open_store
from pipeline.text import plural


@dataclass
class RepairResult:
    """What was repaired, and what cannot be repaired, one line each."""

    repaired: list[str] = field(default_factory=list)
    unrepaired: list[str] = field(default_factory=list)


def repair(url: str, run: ParallelMap = map, on_shard: Callable[[], None] = lambda: None) -> RepairResult:
    """Rebuild damaged or missing indexes, table of shards and manifest from the tars.

    A damaged tar cannot be repaired, but must be built again from its source. It is listed in the result.

    Args:
        run: does the work, see `pipeline.parallel`.
        on_shard: called after each shard is verified.
    """
    result = RepairResult()
    store = open_store(url)
    try:
        dataset = open_dataset(url)
    except UserError as error:
        if store.exists(BUILDING):
            raise
        dataset = _repair_tables(store, run, result, str(error))
    encoder = encoder_of(dataset.manifest)
    for found in find_damage(dataset, run, on_shard):
        if not found.tar_ok:
            source = dataset.manifest.built.get("source") or "its source"
            result.unrepaired.append(f"{found.problems[0]}; build it again from {source}")
        elif found.index_ok:
            result.unrepaired += found.problems
        elif made := {"view", "mix"} & dataset.manifest.built.keys():
            again = f"make it again with `maestream shards {made.pop()} … {store.url} --overwrite`"
            result.unrepaired += [f"{problem}; {again}" for problem in found.problems]
        else:
            job = next(job for job in verify_jobs(dataset) if job.name == found.name)
            _repair_index(job, dataset.manifest, encoder, result)
    return result


def encoder_of(manifest: Manifest) -> LabelEncoder:
    """The encoder of the labels in a dataset's tars.

    The tars of a build have numbers; tars of others may have names.
    """
    classes = manifest.classes
    by_name = "indexed" in manifest.built and classes != [str(label) for label in range(len(classes))]
    return LabelEncoder(
        manifest.labels, classes, by_name, bool(manifest.built.get("flags")), manifest.built.get("label_kind")
    )


def _repair_index(job: VerifyJob, manifest: Manifest, encoder: LabelEncoder, result: RepairResult) -> None:
    index, _ = _index_of_tar(
        open_tars(job.shard_store), job.name, manifest.checksums, manifest.built, encoder
    )
    name = index_name(job.name)
    if content_digest(index) != job.content:
        result.unrepaired.append(
            f"{name}: the tar does not have the samples that were written; to accept it as it is, run `maestream shards "
            "index --overwrite`"
        )
        return
    open_store(job.store).write(name, to_parquet(index))
    result.repaired.append(f"{name}: rewritten")


def _index_of_tar(
    store: Store, name: str, checksums: bool, built: dict[str, Any], encoder: LabelEncoder
) -> tuple[pa.Table, ScannedShard]:
    """Return the index (`index_table`) of a tar, and what else was found in it. UserError if the tar is damaged."""
    fields, types = fields_of(built)
    had_damage = bool(
        built.get("indexed") and built.get("left_out")
    )  # then damaged samples are left out again
    scan = scan_shard(store, name, ScanOptions(checksums, had_damage, fields))
    rows = scan.rows
    if had_damage:
        fits = [encoder.problem(text) is None for text in rows["label"].to_pylist()]
        rows = rows.filter(pa.array(fits, pa.bool_()))
    try:
        labels = encoder.encode(rows["label"].to_pylist())
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{store.describe(name)} has labels that are not in the manifest, or the manifest is lost, and with it the numbers "
            f"of the classes ({error}): run `maestream shards index --overwrite` to number the classes again"
        ) from None
    return index_table(rows, labels, types), scan


def _repair_tables(store: Store, run: ParallelMap, result: RepairResult, problem: str) -> Dataset:
    """Rewrite the table of shards, and the manifest if it is damaged too, from tars with the names that a build gives."""
    names = [n for n in store.names() if "/" not in n and n.startswith("shard-") and n.endswith(".tar")]
    if not names:
        raise UserError(f"{problem}; it cannot be repaired, because it has no shard-*.tar files")
    try:
        before = Manifest.model_validate_json(store.read(MANIFEST))
    except (FileNotFoundError, ValueError):
        before = None
    checksums = before is None or before.checksums
    encoder = encoder_of(before) if before else LabelEncoder("class", [])
    rows = sorted(
        run(
            _scan_tar,
            [_ScanJob(store.url, name, checksums, before.built if before else {}, encoder) for name in names],
        ),
        key=lambda row: str(row["name"]),
    )
    table = pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA)
    if before is not None:
        if fingerprint([table["content"].combine_chunks()], before.parts) != before.fingerprint:
            raise UserError(
                f"{store.url}: the tars do not match {MANIFEST} ({plural(len(names), 'tar')} found): some are missing, damaged, "
                "or from another dataset. Build the dataset again from its source"
            )
        store.write(before.table, to_parquet(table))
        result.repaired.append(f"{before.table}: rewritten, it matches {MANIFEST}")
    else:
        image_bytes = sum(row["image_bytes"] for row in rows)
        kinds = ImageKinds()
        for row in rows:
            kinds.merge(row["kinds"])
        built = {"source": "repaired from its tars"}
        write_dataset(store, table, image_bytes, _class_names(rows), built, pixels=kinds.pixels())
        result.repaired.append(
            f"{MANIFEST}, {SHARDS}: rewritten from {plural(len(names), 'tar')}; missing tars cannot be detected; the class "
            "names are taken from the folders of the keys"
        )
    return open_dataset(store.url)  # the caller checks its indexes next


def _class_names(rows: list[dict[str, Any]]) -> list[str]:
    """The folder of each label's keys, if every label has one folder and they are in sorted order; otherwise numbers."""
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
class _ScanJob:
    """One tar to scan. The input of one task."""

    url: str
    name: str
    checksums: bool
    built: dict[str, Any]  # see `Manifest`
    encoder: LabelEncoder


def _scan_tar(job: _ScanJob) -> dict[str, Any]:
    """The tar's row of the table of shards, its image bytes, and the key folders of each label.

    UserError if the tar is damaged.
    """
    store = open_shared(job.url, job.name)
    index, scan = _index_of_tar(store, job.name, job.checksums, job.built, job.encoder)
    folders: dict[int, set[str]] = {}
    for label, key in zip(index["label"].to_pylist(), index["key"].to_pylist(), strict=True):
        if job.encoder.kind == "class" and label != NO_LABEL:
            folder, slash, _ = key.partition("/")
            folders.setdefault(label, set()).add(folder if slash else "")
    return {
        "name": job.name,
        "samples": len(index),
        "bytes": store.size(job.name),
        "sha256": scan.sha256,
        "content": content_digest(index),
        "image_bytes": sum(index["size"].to_pylist()),
        "folders": folders,
        "kinds": image_kinds(store, [scan]),
    }
