"""A mix: the samples of several datasets, as one dataset. The tars stay where they are.

Each dataset has a weight: how often each of its samples is seen per epoch (`pipeline.loading.weighted`). Keys may be the same
in several datasets; a sample is told apart by its shard, whose name begins with the name of its dataset.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import (
    INDEX_SCHEMA,
    NO_LABEL,
    SHARDS_SCHEMA,
    Manifest,
    Part,
    content_digest,
    write_dataset,
)
from pipeline.errors import UserError
from pipeline.images.pixels import Pixels
from pipeline.parallel import map_ahead
from pipeline.storage.store import Store
from pipeline.text import plural
from pipeline.views.destination import IndexWriter, check_destination, parts_elsewhere

THREADS = 16  # more than cores, because they mostly wait for small reads
MOST, FINEST = 1000, 1_000_000  # largest weight, and largest denominator of one


@dataclass
class MixResult:
    """The manifest that was written, and counts."""

    manifest: Manifest
    bytes: int  # written
    renumbered: list[str]  # datasets whose classes have other numbers in the mix
    without_checksums: list[str]  # datasets that have none, so the mix has none either
    lost: list[str]  # kept columns whose types differ between the datasets


def parse_weight(text: str) -> Fraction:
    """A weight from "3", "0.5" or "1/3". UserError if it is not a positive number."""
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"weight {text}: expected a number such as 3, 0.5 or 1/3") from None
    if not 0 < weight <= MOST or weight.denominator > FINEST:
        raise UserError(
            f"weight {text}: expected a number above 0, at most {MOST}, with at most 6 decimals (leave a dataset out "
            "instead of giving it the weight 0)"
        )
    return weight


def make_mix(
    sources: Sequence[Dataset],
    weights: Sequence[Fraction],
    to: Store,
    overwrite: bool = False,
    on_shard: Callable[[], None] = lambda: None,
) -> MixResult:
    """Write a mix of datasets to `to`: indexes, table of shards and manifest.

    If all have the same classes, these keep their numbers. Otherwise the mix has the classes of the first, then those of the
    second that are new, and so on, and the new indexes have these numbers.

    Args:
        weights: of each dataset.
        overwrite: whether to replace a mix that is there.
        on_shard: called after each shard is written.

    Raises UserError if the datasets do not fit together; then nothing is written.
    """
    check_destination(to, list(sources), overwrite)
    first = _labelled(sources)
    check_alike(sources, first)
    classes = list(dict.fromkeys(name for source in sources for name in source.manifest.classes))
    kept, lost = _kept_columns(sources)
    jobs: list[
        tuple[Dataset, int, str]
    ] = []  # a shard: its dataset, its number there, and its name in the mix
    parts: list[Part] = []
    names = _names(sources)
    for source, weight, name in zip(sources, weights, names, strict=True):
        taken = {part.prefix for part in parts} | set(names) - {name}
        own, shard_names = _parts_in_mix(source, weight, name, taken)
        parts += own
        jobs += [(source, shard, shard_name) for shard, shard_name in enumerate(shard_names)]
    writer = IndexWriter(to)
    writer.begin()

    def write_index(job: tuple[Dataset, int, str]) -> dict[str, Any]:
        source, shard, shard_name = job
        index = _with_columns(source.read_index_table(shard, kept=True), kept)
        numbers = numbers_in(source.manifest.classes, classes)
        if numbers is not None:
            index = renumbered(index, numbers)
        writer.write(shard_name, index)
        return {
            "name": shard_name,
            "samples": len(index),
            "bytes": int(source.shard_bytes[shard]),
            "sha256": source.shard_sha256[shard].as_py(),
            "content": content_digest(index),
        }

    rows: list[dict[str, Any]] = []
    for row in map_ahead(write_index, jobs, THREADS):
        rows.append(row)
        on_shard()
    described = ", ".join(f"{w} × {s.store.url}" for s, w in zip(sources, weights, strict=True))
    manifest = write_dataset(
        to,
        pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA),
        sum(source.manifest.image_bytes for source in sources),
        classes,
        {"mix": described},
        checksums=all(source.manifest.checksums for source in sources),
        labels=first.manifest.labels,
        pixels=first.manifest.pixels,
        parts=parts,
    )
    return MixResult(
        manifest,
        writer.end(),
        [s.store.url for s in sources if numbers_in(s.manifest.classes, classes) is not None],
        [s.store.url for s in sources if not s.manifest.checksums]
        if any(s.manifest.checksums for s in sources)
        else [],
        lost,
    )


def _labelled(sources: Sequence[Dataset]) -> Dataset:
    """The first dataset with labels, or the first."""
    return next((source for source in sources if source.manifest.classes), sources[0])


def check_alike(sources: Sequence[Dataset], first: Dataset) -> None:
    """UserError if labels or images of the datasets are of different kinds."""
    for source in sources:
        ours, theirs = first.manifest, source.manifest
        if theirs.labels != ours.labels and theirs.classes:
            raise UserError(
                f"{source.store.url} has labels of the kind {theirs.labels}, but {first.store.url} of the kind {ours.labels}: they "
                "cannot be mixed; index one of them again with --label-kind"
            )
        if ours.labels == "numbers" and theirs.classes != ours.classes:
            raise UserError(
                f"{source.store.url} has other numbers to predict ({', '.join(theirs.classes) or 'none'}) than "
                f"{first.store.url} ({', '.join(ours.classes)}): they cannot be mixed"
            )
        if theirs.labels != ours.labels and ours.labels != "class":
            raise UserError(
                f"{source.store.url} has no labels, but those of {first.store.url} are of the kind {ours.labels}: they cannot be "
                "mixed"
            )
        if theirs.pixels != ours.pixels:
            raise UserError(
                f"{source.store.url} has images of {_describe(theirs.pixels)}, but {first.store.url} of "
                f"{_describe(ours.pixels)}: they cannot be mixed; make one of them again"
            )


def _names(sources: Sequence[Dataset]) -> list[str]:
    """A name for each dataset: the last part of its path, with a number if another has the same."""
    names: list[str] = []
    for source in sources:
        name = base = source.store.url.rpartition("/")[2] or "data"
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def _parts_in_mix(
    source: Dataset, weight: Fraction, name: str, taken: set[str]
) -> tuple[list[Part], list[str]]:
    """The parts that a dataset becomes in the mix, and the names of its shards there.

    Args:
        taken: prefixes that other parts have.
    """
    several = len({part.name for part in source.parts}) > 1
    parts, shard_names, shard = [], [], 0
    for part in parts_elsewhere(source):
        prefix = f"{name}.{part.prefix}" if part.prefix else name
        while prefix in taken:
            prefix += "_"
        taken = taken | {prefix}
        for _ in range(part.shards):
            own = source.shard_name(shard)
            shard_names.append(f"{prefix}/{own.removeprefix(part.prefix + '/') if part.prefix else own}")
            shard += 1
        parts.append(
            part.model_copy(
                update={
                    "name": f"{name}.{part.name}" if several else name,
                    "prefix": prefix,
                    "weight": str(part.times * weight),
                }
            )
        )
    return parts, shard_names


def numbers_in(own: list[str], classes: list[str]) -> np.ndarray | None:
    """The number in the mix of each class of a dataset, int32[classes]; None if they are the same."""
    if own == classes[: len(own)]:
        return None
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for name in own], np.int32)


def renumbered(index: pa.Table, numbers: np.ndarray) -> pa.Table:
    """The index with other numbers of the classes."""
    labels, place = index["label"].combine_chunks(), index.column_names.index("label")
    if pa.types.is_list(labels.type):
        values = pa.array(numbers[labels.flatten().to_numpy()], pa.int32())
        lengths = np.diff(labels.offsets.to_numpy())
        offsets = pa.array(np.r_[0, np.cumsum(lengths)].astype(np.int32))
        changed = pa.ListArray.from_arrays(offsets, values, mask=labels.is_null())
    else:
        old = labels.to_numpy()
        changed = pa.array(np.where(old == NO_LABEL, NO_LABEL, numbers[old]), pa.int32())
    return index.set_column(place, index.schema.field("label"), changed)


def _kept_columns(sources: Sequence[Dataset]) -> tuple[pa.Schema, list[str]]:
    """The columns that `--keep-json` kept in any of the datasets; and the names of those whose types do not fit together."""
    found: dict[str, pa.DataType] = {}
    lost: set[str] = set()
    for source in sources:
        for field in source.read_index_table(0, kept=True).schema:
            if field.name in INDEX_SCHEMA.names:
                continue
            try:
                one, other = (
                    pa.schema([(field.name, t)]) for t in (found.get(field.name, field.type), field.type)
                )
                found[field.name] = pa.unify_schemas([one, other], promote_options="permissive").field(0).type
            except pa.ArrowException:
                lost.add(field.name)
    return pa.schema([(name, kind) for name, kind in found.items() if name not in lost]), sorted(lost)


def _with_columns(index: pa.Table, kept: pa.Schema) -> pa.Table:
    """The index with these columns besides those that every index has; NULL if it does not have one."""
    table = index.select(INDEX_SCHEMA.names)
    for field in kept:
        values = (
            index[field.name].cast(field.type)
            if field.name in index.column_names
            else pa.nulls(len(index), field.type)
        )
        table = table.append_column(field, values)
    return table


def _describe(pixels: Pixels) -> str:
    """A type of pixels in words."""
    bits = f", {pixels.bits} of 16 bits (--bits)" if pixels.bits != 16 else ""
    return f"{plural(pixels.channels, 'channel')} ({pixels.dtype}{bits})"
