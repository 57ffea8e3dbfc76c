"""Extend a dataset by new shards. The tars stay where they are.

New shards come after all others, and new classes after all others. So the samples that were there keep their ids and labels, and
a run can continue with the larger dataset (`trainer.growth`).

First the new indexes are written, then a new table of shards under another name, and the manifest last: whoever opens
the dataset finds the old one or the new one. A run that opened the old one still finds its files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.index import find_shards, index_shards
from pipeline.dataset.manifest import (
    BUILDING,
    MANIFEST,
    SHARDS,
    SHARDS_SCHEMA,
    Manifest,
    Part,
    content_digest,
    write_dataset,
)
from pipeline.errors import UserError
from pipeline.parallel import map_ahead
from pipeline.storage.parquet import parse_parquet
from pipeline.storage.store import open_store
from pipeline.text import plural
from pipeline.views.destination import IndexWriter, parts_elsewhere
from pipeline.views.mix import THREADS, check_alike, numbers_in, renumbered
from pipeline.views.view import fields_of_tars


@dataclass
class ExtendResult:
    """The manifest that was written, and counts."""

    manifest: Manifest
    bytes: int  # written
    shards: int  # new
    samples: int  # new
    classes: list[str]  # new
    known: int  # tars that the dataset had already; they are left out
    notes: list[str] = field(default_factory=list)


@dataclass
class _New:
    """Shards to add: a dataset, and the names of its classes there."""

    dataset: Dataset
    classes: list[str]
    known: int = 0


def extend_dataset(
    url: str,
    sources: Sequence[str],
    scratch: Path,
    skip_damaged: bool = False,
    on_shard: Callable[[], None] = lambda: None,
) -> ExtendResult:
    """Add datasets, tars or folders of tars to the dataset at `url`.

    Args:
        scratch: an empty local folder, for the indexes of tars.
        skip_damaged: whether to skip damaged samples of tars. Otherwise the first one is a UserError.
        on_shard: called after each new shard is written.

    Raises UserError if the shards do not fit the dataset, or are in it already; then nothing is written.
    """
    dataset = open_dataset(url)
    to = dataset.store
    if to.exists(BUILDING):
        raise UserError(f"{to.url} contains an unfinished build: finish it first")
    new = [_open(dataset, source, scratch / str(nth), skip_damaged) for nth, source in enumerate(sources)]
    check_alike([dataset, *(one.dataset for one in new)], dataset)
    classes = list(dict.fromkeys([*dataset.manifest.classes, *(name for one in new for name in one.classes)]))
    if classes != dataset.manifest.classes and dataset.manifest.labels == "numbers":
        raise UserError(f"{to.url} has other numbers to predict than the new shards: they do not fit")
    _refuse_known(dataset, new, classes)
    parts = list(dataset.parts)
    jobs: list[tuple[_New, int, str]] = []
    for one in new:
        taken = {*dataset.shard_names.to_pylist(), *(name for _, _, name in jobs)}
        own, names = _place(dataset, parts, taken, one.dataset)
        parts += own
        jobs += [(one, shard, name) for shard, name in enumerate(names)]
    writer = IndexWriter(to)

    def write_index(job: tuple[_New, int, str]) -> dict[str, Any]:
        one, shard, name = job
        index = one.dataset.read_index_table(shard, kept=True)
        if (numbers := numbers_in(one.classes, classes)) is not None:
            index = renumbered(index, numbers)
        writer.write(name, index)
        return {
            "name": name,
            "samples": len(index),
            "bytes": int(one.dataset.shard_bytes[shard]),
            "sha256": one.dataset.shard_sha256[shard].as_py(),
            "content": content_digest(index),
        }

    rows: list[dict[str, Any]] = []
    for row in map_ahead(write_index, jobs, THREADS):
        rows.append(row)
        on_shard()
    table = pa.concat_tables([_table(dataset), pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA)])
    manifest = _write(dataset, [one.dataset for one in new], table, classes, parts)
    return ExtendResult(
        manifest,
        writer.end(manifest.table),
        len(rows),
        sum(row["samples"] for row in rows),
        classes[len(dataset.manifest.classes) :],
        sum(one.known for one in new),
    )


def _open(dataset: Dataset, source: str, scratch: Path, skip_damaged: bool) -> _New:
    """Open what is to be added. Tars are indexed first, into the folder `scratch`."""
    store = open_store(source)
    if store.url.endswith(".tar"):
        folder, _, name = store.url.rpartition("/")
        store, names = open_store(folder or "/"), [name]
        if not store.exists(name):
            raise UserError(f"{store.describe(name)}: no such file")
    elif store.url != dataset.store.url and store.exists(MANIFEST):
        found = open_dataset(store.url)
        return _New(found, found.manifest.classes)
    else:
        names = find_shards(store)
    places = {dataset.shard_store.describe(name) for name in dataset.shard_names.to_pylist()}
    fresh = [name for name in names if store.describe(name) not in places]
    if not fresh:
        raise UserError(
            f"{store.url}: {dataset.store.url} has {plural(len(names), 'tar')} of it already, and there is no other"
        )
    ours = dataset.manifest
    if "mix" in ours.built:
        raise UserError(
            f"{dataset.store.url} is a mix, whose datasets may have different fields: make a dataset of {store.url} with "
            "`maestream shards index`, and extend the mix by that"
        )
    fields, _ = fields_of_tars(dataset)
    index_shards(
        store,
        fresh,
        open_store(str(scratch)),
        checksums=ours.checksums,
        bits=ours.pixels.bits if ours.pixels.bits != 16 else None,
        skip_damaged=skip_damaged,
        # Whole numbers alone may be numbers to predict. Otherwise labels tell what they are, and `check_alike` compares.
        fields=replace(fields, kind=fields.kind or ("numbers" if ours.labels == "numbers" else None)),
    )
    found = open_dataset(str(scratch))
    return _New(found, _class_names(dataset, found), len(names) - len(fresh))


def _class_names(dataset: Dataset, found: Dataset) -> list[str]:
    """The names of the classes of tars. Numbers are those of the dataset's classes.

    UserError if it has no class with such a number, or has class names but the tars have numbers.
    """
    own, classes = found.manifest.classes, dataset.manifest.classes
    if own != [str(label) for label in range(len(own))] or not own or dataset.manifest.labels == "numbers":
        return own
    if classes == [str(label) for label in range(len(classes))]:
        return own
    if len(own) > len(classes):
        raise UserError(
            f"{found.shard_store.describe()} has the label {len(own) - 1}, but {dataset.store.url} has only "
            f"{plural(len(classes), 'class', 'classes')}, with names: give the tars class names, or index them and mix the two"
        )
    return classes[: len(own)]


def _refuse_known(dataset: Dataset, new: Sequence[_New], classes: list[str]) -> None:
    """UserError if a shard has exactly the samples of another: then it is probably the same data again.

    Args:
        classes: of the larger dataset. Samples are compared with these numbers, because digests include labels.
    """
    seen = dict(zip(dataset.shard_content.to_pylist(), dataset.shard_names.to_pylist(), strict=True))
    for one in new:
        found = one.dataset
        contents = found.shard_content.to_pylist()
        if (numbers := numbers_in(one.classes, classes)) is not None:
            tables = (found.read_index_table(shard, kept=True) for shard in range(len(contents)))
            contents = [content_digest(renumbered(table, numbers)) for table in tables]
        for content, name in zip(contents, found.shard_names.to_pylist(), strict=True):
            if content in seen:
                raise UserError(
                    f"{found.shard_store.describe(name)} has the same samples as {seen[content]}, which {dataset.store.url} has "
                    "already: leave it out, or mix the two with a weight if samples are to be seen more often"
                )
            seen[content] = name


def _place(
    dataset: Dataset, parts: Sequence[Part], taken: set[str], found: Dataset
) -> tuple[list[Part], list[str]]:
    """The parts that new shards become, and the names of the shards.

    Args:
        parts, taken: the parts and the names of the shards so far.
    """
    several = len({part.name for part in dataset.parts}) > 1 or dataset.manifest.weighted
    own: list[Part] = []
    names: list[str] = []
    for part in parts_elsewhere(found):
        first = len(names)
        tars = [
            found.shard_name(shard).removeprefix(part.prefix + "/" if part.prefix else "")
            for shard in range(first, first + part.shards)
        ]
        # Tars in a place where there are some already belong to these.
        same = next((p for p in parts if (p.url or dataset.store.url) == part.url), None)
        prefix = same.prefix if same else ""
        if not same or taken.intersection(_named(prefix, tars)):
            used = {p.prefix for p in [*parts, *own]}
            prefix = next(f"+{n}" for n in range(1, len(used) + 2) if f"+{n}" not in used)
        names += _named(prefix, tars)
        name = same.name if same else part.name if several else dataset.parts[0].name
        own.append(
            Part(
                name=name,
                url=same.url if same else part.url,
                shards=part.shards,
                prefix=prefix,
                weight=same.weight if same else part.weight,
            )
        )
    return own, names


def _named(prefix: str, tars: list[str]) -> list[str]:
    """The names of tars in the table of shards."""
    return [f"{prefix}/{tar}" if prefix else tar for tar in tars]


def _table(dataset: Dataset) -> pa.Table:
    """The table of shards: SHARDS_SCHEMA."""
    name = dataset.manifest.table
    return parse_parquet(
        dataset.store.describe(name), dataset.store.read(name), SHARDS_SCHEMA, SHARDS_SCHEMA.names
    )


def _write(
    dataset: Dataset, new: Sequence[Dataset], table: pa.Table, classes: list[str], parts: Sequence[Part]
) -> Manifest:
    """Write the larger dataset's table and manifest, and remove tables that nobody needs any more."""
    old, to = dataset.manifest, dataset.store
    plain = len({(part.url or to.url, part.prefix, part.weight) for part in parts}) == 1 and not old.parts
    manifest = write_dataset(
        to,
        table,
        old.image_bytes + sum(one.manifest.image_bytes for one in new),
        classes,
        {**old.built, "extended": int(old.built.get("extended", 0)) + 1},
        checksums=old.checksums and all(one.manifest.checksums for one in new),
        shards_url=old.shards_url if plain else None,
        labels=old.labels,
        pixels=old.pixels,
        parts=() if plain else parts,
        table=f"shards-{len(table)}.parquet",
    )
    unused = [
        name
        for name in to.entries(folders=False)
        if name.startswith("shards-")
        and name.endswith(".parquet")
        and name not in (old.table, manifest.table)
    ]
    if unused or old.table != SHARDS:
        to.remove([*unused, *([SHARDS] if old.table != SHARDS and to.exists(SHARDS) else [])])
    return manifest
