"""Build a dataset from images: plain WebDataset tars, each with an index.

Builds are deterministic and resumable; the output is byte-identical at any parallelism. First the images are shuffled by
the seed and cut into shards of about equal size: this is the plan. Then each shard is written independently; its contents
depend only on the plan.

    DEST/building.json                  source and options; while it exists, DEST is not a dataset
    DEST/building/shard-000000.json     receipt of a finished shard, with the digests of tar and index

A killed build resumes when the same command is run again: finished shards whose digests match are kept.
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from pipeline.arrays import Ints
from pipeline.build.duplicates import duplicates_in, without_duplicates
from pipeline.build.image_table import Source, images_per_class, kept_names
from pipeline.build.shard_writer import (
    BuildOptions,
    Receipt,
    ShardJob,
    build_digest,
    receipt_name,
    write_shard,
)
from pipeline.build.sources import open_source
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.fields import Fields, kept_type_name
from pipeline.dataset.index import built_fields
from pipeline.dataset.manifest import (
    BUILDING,
    BUILDING_FOLDER,
    MANIFEST,
    SHARDS,
    SHARDS_SCHEMA,
    Manifest,
    index_name,
    index_schema,
    read_file,
    write_dataset,
)
from pipeline.dataset.statistics import STATISTICS
from pipeline.errors import UserError
from pipeline.hashing import hash64
from pipeline.images.kinds import ImageKinds
from pipeline.images.pixels import Pixels
from pipeline.parallel import ParallelMap
from pipeline.storage.parquet import parse_parquet
from pipeline.storage.store import TEMPORARY, Store, open_store
from pipeline.text import plural

CONTACT_SHEET = "contact-sheet.png"
LEFT_OUT, DUPLICATES = "left-out.txt", "duplicates.txt"  # skipped and duplicate images, one line each


@dataclass
class BuildResult:
    """What a build did."""

    manifest: Manifest
    notes: tuple[str, ...]  # see `Source.notes`
    kept: int  # number of shards that an earlier, killed build had finished
    changed: int  # number of images that were converted
    odd: dict[str, int]  # number of images that are not RGB or greyscale JPEGs, by kind, such as "PNG"
    skipped: list[str]  # "name: reason" of each image that cannot be read
    duplicates: list[str]  # one line per duplicate image, whether dropped or kept
    bits_note: str | None  # how 16-bit images are read, if their files do not say
    lost_classes: list[str]  # classes that had images in the source, and have none in the dataset


def build(
    source: str,
    store: Store,
    options: BuildOptions,
    *,
    devkit: str | None = None,
    memory: int = 256 << 20,
    overwrite: bool = False,
    run: ParallelMap = map,
    on_source: Callable[[tuple[str, ...]], None] = lambda notes: None,
    on_plan: Callable[[int], None] = lambda images: None,
    on_shard: Callable[[Receipt, bool], None] = lambda receipt, kept: None,
) -> BuildResult:
    """Write all images of `source` (see `pipeline.build.sources`) as a dataset to `store`.

    Images that cannot be read are skipped and listed, or with `strict` a UserError. A killed build is resumed by the same
    call. UserError if source or destination are not valid.

    Args:
        devkit: path or URL of ImageNet's devkit, for the labels of its validation images.
        memory: bytes of encoded images that one task may hold.
        overwrite: whether to replace a dataset, or an unfinished build of something else.
        run: does the work, see `pipeline.parallel`.
        on_source: called with the notes about the source (see `Source.notes`), once it is listed.
        on_plan: called with the number of images.
        on_shard: called for each finished shard with its receipt, and whether an earlier build had finished it.
    """
    identity = _identity(source, options)
    _check_destination(source, store, identity, overwrite)
    if (finished := _finished_manifest(store, identity)) is not None:  # killed during the clean-up
        remove_build_files(store)
        return BuildResult(finished, (), finished.shards, 0, {}, [], [], None, [])

    @functools.cache
    def claim() -> Store:
        """Not before the source is known to be valid: until then an existing dataset stays as it is."""
        _claim_destination(store, identity)
        return store

    opened = open_source(source, claim, devkit, run, options.source)
    on_source(opened.notes)
    if options.strict and opened.left_out:
        raise UserError(
            f"{opened.description}: {opened.left_out[0]}. Build without --strict to leave such images out"
        )
    listed = opened
    receipts_before = set(claim().names(BUILDING_FOLDER))
    dropped: list[str] = []
    if options.drop_duplicates:
        opened, dropped = without_duplicates(opened, run, memory)
    on_plan(len(opened.items))
    receipts: list[Receipt] = []
    kept = 0
    kinds = ImageKinds()
    for receipt, was_finished in run(write_shard, plan_shards(opened, store, options, memory)):
        # A task that is retried may find the shard that its first attempt finished: that is not an earlier build.
        was_kept = was_finished and receipt_name(receipt.name) in receipts_before
        on_shard(receipt, was_kept)
        receipts.append(receipt)
        kept += was_kept
        kinds.merge(receipt.kinds)
        kinds.pixels()  # as early as possible: an error for images that do not fit each other
    receipts.sort(key=lambda receipt: receipt.name)
    skipped = [line for receipt in receipts for line in receipt.left_out]
    if len(skipped) == len(opened.items):
        raise UserError(
            f"{opened.description}: none of the {plural(len(skipped), 'image')} can be read: {skipped[0]}"
        )
    skipped = [*opened.left_out, *skipped]
    _check_bits_lost(receipts)
    lost = _lost_classes(listed, store, receipts) if skipped or dropped else []
    pixels = kinds.pixels(options.conversion.bits)
    manifest = _finish(opened, store, options, receipts, dropped, lost, identity, pixels)
    duplicates = dropped if options.drop_duplicates else duplicates_in(open_dataset(store.url))
    for name, lines in ((LEFT_OUT, skipped), (DUPLICATES, duplicates)):
        if lines:
            store.write(name, "".join(f"{line}\n" for line in lines).encode())
    remove_build_files(store)
    changed = sum(receipt.changed for receipt in receipts)
    note = kinds.note(options.conversion.bits)
    odd = _total_odd(receipts)
    return BuildResult(manifest, opened.notes, kept, changed, odd, skipped, duplicates, note, lost)


def plan_shards(source: Source, store: Store, options: BuildOptions, memory: int) -> Iterator[ShardJob]:
    """Shuffle the images by the seed, and yield a job for each shard, in order. Arguments as in `build`."""
    order = np.argsort(hash64(options.seed, np.arange(len(source.items))), kind="stable")
    build = build_digest(store)
    bounds = shard_bounds(source.items["size"].to_numpy()[order], options.shard_bytes)
    for number, (first, last) in enumerate(itertools.pairwise(bounds.tolist())):
        items = source.items.take(order[first:last]).combine_chunks()
        digest = hashlib.sha256(_identity(source.reader.identity, options))
        for batch in items.to_batches():
            digest.update(batch.serialize())
        name = f"shard-{number:06d}.tar"
        yield ShardJob(name, items, source.reader, store.url, options, memory, digest.hexdigest(), build)


def shard_bounds(sizes: Ints, shard_bytes: int) -> Ints:
    """Cut a sequence of images into shards of about equal size, none of them empty.

    Args:
        sizes: bytes of each image.
        shard_bytes: wanted size of a shard.

    Returns the first image of each shard, and the number of images: int64[shards + 1].
    """
    ends = np.cumsum(sizes)
    count = min(max(round(int(ends[-1]) / shard_bytes), 1), len(sizes))
    targets = ends[-1] * np.arange(1, count) / count
    inner = np.searchsorted(ends, targets) + 1
    return np.unique(np.concatenate([[0], inner, [len(sizes)]]))


# ---- the destination ------------------------------------------------------------------------------------------


def _identity(source: str, options: BuildOptions) -> bytes:
    """The contents of building.json: all that the bytes of a build depend on.

    A build is resumed only if these bytes are equal, so do not rename or reorder the keys. Newer options are added only
    where they are used, so that builds of earlier versions are resumed.
    """
    tree = {
        "source": source,
        "shard_bytes": options.shard_bytes,
        "seed": options.seed,
        "check": options.check,
        "changes": options.conversion.changes(),
        "drop_duplicates": options.drop_duplicates,
        **options.source.changes(),
    }
    return json.dumps(tree, indent=2).encode() + b"\n"


def _canonical(url: str) -> str:
    """The same text for all spellings of the same folder or bucket prefix."""
    store = open_store(url)
    return os.path.realpath(store.root) if store.is_local else f"{type(store.fs).__name__}:{store.root}"


def _check_destination(source: str, store: Store, identity: bytes, overwrite: bool) -> None:
    """UserError if the destination may not be written to. Changes nothing."""
    if not source.startswith("synthetic:"):
        to, origin = f"{_canonical(store.url)}/", f"{_canonical(source)}/"
        if to.startswith(origin):
            raise UserError(f"{store.url} is inside the source: choose another destination")
        if origin.startswith(to):
            raise UserError(f"{source} is inside the destination: choose another destination")
    names = [name for name in store.names() if not _is_temporary(name)]
    if BUILDING in names:
        if store.read(BUILDING) != identity and not overwrite:
            raise UserError(
                f"{store.url} contains an unfinished build from another source or with other options (see {BUILDING}): run its "
                "command again to resume it, or add --overwrite to start over"
            )
    elif MANIFEST in names:
        if not overwrite:
            raise UserError(
                f"{store.url} already has a dataset: choose another destination, or add --overwrite"
            )
        if b'"indexed":' in store.read(MANIFEST):  # works for a damaged manifest, too
            raise UserError(
                f"{store.url} was made by `maestream shards index`, and its tars may be the only copy: choose another "
                "destination"
            )
    elif names:
        raise UserError(
            f"{store.url} is not empty and not a dataset ({names[0]}, …): choose another destination"
        )


def _claim_destination(store: Store, identity: bytes) -> None:
    """Start or resume a build: write building.json, and remove an old dataset or an unfinished build of something else."""
    names = store.names()
    if BUILDING in names and store.read(BUILDING) == identity:
        to_remove = [MANIFEST] if MANIFEST in names else []
    else:
        # building.json is written first, and the manifest removed first: a build killed here is recognised as unfinished.
        store.write(BUILDING, identity)
        to_remove = sorted(filter(_may_remove, names), key=lambda name: name != MANIFEST)
    store.remove(to_remove)


def _finish(
    source: Source,
    store: Store,
    options: BuildOptions,
    receipts: list[Receipt],
    dropped: list[str],
    lost_classes: list[str],
    identity: bytes,
    pixels: Pixels,
) -> Manifest:
    """Write the table of shards and the manifest."""
    skipped = len(source.left_out) + sum(len(receipt.left_out) for receipt in receipts)
    odd, names = _total_odd(receipts), kept_names(source.items)
    receipts = [receipt for receipt in receipts if receipt.samples]
    columns = SHARDS_SCHEMA.names
    rows = [{name: getattr(receipt, name) for name in columns} for receipt in receipts]
    built = {
        "source": source.description,
        "seed": options.seed,
        "bytes": str(options.conversion),
        "changed": sum(receipt.changed for receipt in receipts),
        "checked": options.check,
        "left_out": skipped,
        "duplicates_dropped": len(dropped),
        "odd": odd,
        **built_fields(
            Fields(keep=tuple(names)), {name: kept_type_name(source.items[name].type) for name in names}
        ),
        **({"classes_without_images": ", ".join(lost_classes)} if lost_classes else {}),
        "build": _digest(identity),
    }
    table = pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA)
    image_bytes = sum(receipt.image_bytes for receipt in receipts)
    return write_dataset(store, table, image_bytes, source.classes, built, labels=source.kind, pixels=pixels)


def _check_bits_lost(receipts: list[Receipt]) -> None:
    """UserError if 16-bit images were converted to 8 bits as if their values used all bits, but none did."""
    used = max((receipt.bits_lost for receipt in receipts), default=0)
    if 0 < used < 16:
        raise UserError(
            f"the values of the 16-bit images use only {used} bits, so as 8-bit JPEGs they would be nearly black: build again "
            f"with --overwrite and --bits {used}, or with --bits 16 if they are meant to be so dark"
        )


def _lost_classes(source: Source, store: Store, receipts: list[Receipt]) -> list[str]:
    """The classes of which all images were left out."""
    before, after = source.images_per_class(), np.zeros(len(source.classes), np.int64)
    schema = index_schema(source.kind)
    for receipt in receipts:
        if receipt.samples:
            name = index_name(receipt.name)
            index = parse_parquet(store.describe(name), read_file(store, name), schema, ["label"])
            after += images_per_class(index["label"], len(source.classes))
    return [source.classes[label] for label in np.flatnonzero((before > 0) & (after == 0))]


def _digest(identity: bytes) -> str:
    return hashlib.sha256(identity).hexdigest()[:16]


def _finished_manifest(store: Store, identity: bytes) -> Manifest | None:
    """The manifest, if this build wrote it and was killed during the clean-up. Otherwise None."""
    if not (store.exists(BUILDING) and store.exists(MANIFEST)) or store.read(BUILDING) != identity:
        return None
    try:
        manifest = open_dataset(store.url).manifest
    except UserError:
        return None
    return manifest if manifest.built.get("build") == _digest(identity) else None


def remove_build_files(store: Store) -> None:
    """Remove the temporary files of a finished build, and leftovers of earlier builds."""
    dataset = open_dataset(store.url)
    names = [dataset.shard_name(shard) for shard in range(dataset.manifest.shards)]
    used = {MANIFEST, SHARDS, CONTACT_SHEET, LEFT_OUT, DUPLICATES, *names, *map(index_name, names)}
    store.remove([name for name in store.names() if _may_remove(name) and name not in used])
    store.remove([BUILDING])


def _total_odd(receipts: Iterable[Receipt]) -> dict[str, int]:
    """`Receipt.odd`, summed over all shards."""
    total: dict[str, int] = {}
    for receipt in receipts:
        for kind, count in receipt.odd.items():
            total[kind] = total.get(kind, 0) + count
    return dict(sorted(total.items()))


def _is_temporary(name: str) -> bool:
    return PurePosixPath(name).name.startswith(TEMPORARY)


def _may_remove(name: str) -> bool:
    """Whether a build may remove a file: only what a build writes, and nothing of datasets in subfolders."""
    folder, _, base = name.rpartition("/")
    if folder == "":
        return (
            name in (MANIFEST, SHARDS, STATISTICS, CONTACT_SHEET, LEFT_OUT, DUPLICATES)
            or fnmatch(base, "shard-*.tar")
            or _is_temporary(base)
        )
    if folder == BUILDING_FOLDER:
        return True
    return folder == "index" and (fnmatch(base, "shard-*.parquet") or _is_temporary(base))
