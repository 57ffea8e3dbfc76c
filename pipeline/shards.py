"""Build sharded datasets: plain WebDataset tars, each with an index beside it.

First a plan: every image gets its place by the seed, and the row of all images is cut into shards of about as many
bytes of the source. Then shards are written, each on its own, wherever there is a core: what is in a shard depends on
nothing but the plan, so any number of tasks gives the same bytes.

    DEST/building.json                  what is being built; while it is there, it is no dataset
    DEST/building/shard-000000.json     that a shard is done, with the digests of what was written

A build that is killed goes on when the same command comes again: shards whose digests are right are kept.
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.ahead import Run
from pipeline.duplicates import duplicates_in, without_duplicates
from pipeline.errors import UserError
from pipeline.hashing import hash64
from pipeline.items import Source
from pipeline.manifest import (
    BUILDING,
    BUILDING_FOLDER,
    MANIFEST,
    SHARDS,
    SHARDS_SCHEMA,
    Manifest,
    index_name,
    open_dataset,
    write_dataset,
)
from pipeline.sources import open_source
from pipeline.storage import TEMPORARY, Store, open_store
from pipeline.write import Options, Receipt, Shard, build_digest, receipt_name, write_shard

CONTACT_SHEET = "contact-sheet.png"
LEFT_OUT, DUPLICATES = "left-out.txt", "duplicates.txt"  # a line an image


@dataclass
class Built:
    """What a build did."""

    manifest: Manifest
    warnings: tuple[str, ...]
    kept: int  # shards that were there from before
    changed: int
    odd: dict[str, int]
    left_out: list[str]  # "name: reason" of each bad image
    duplicates: list[str]  # a line for each, be it dropped or there


def build(
    source: str,
    store: Store,
    options: Options,
    *,
    devkit: str | None = None,
    memory: int = 256 << 20,
    overwrite: bool = False,
    run: Run = map,
    on_plan: Callable[[int], None] = lambda images: None,
    on_shard: Callable[[Receipt, bool], None] = lambda receipt, kept: None,
) -> Built:
    """Write all images of `source` (see `pipeline.sources`) as a dataset into `store`.

    Images that cannot be read are left out and named, or stop the build if `strict`. The same source and options give
    the same bytes, whatever `run` is. Whoever kills it and calls it again goes on.

    Args:
        devkit: of ImageNet, for the labels of its validation images.
        memory: bytes of images, as they are in the source, that one task may hold.
        overwrite: whether a dataset, or a build of something else, may be replaced.
        run: does the work, see `pipeline.ahead`.
        on_plan: told how many images there are.
        on_shard: told of each shard that is done, and whether it was before.
    """
    identity = _identity(source, options)
    _check(source, store, identity, overwrite)
    if (before := _finished(store, identity)) is not None:  # killed while it cleaned up
        _clean_up(store)
        return Built(before, (), before.shards, 0, {}, [], [])

    @functools.cache
    def take() -> Store:
        """Only now: what is there is kept if something is wrong with the source."""
        _take(store, identity)
        return store

    opened = open_source(source, take, devkit, run)
    receipts_before = set(take().names(BUILDING_FOLDER))
    dropped: list[str] = []
    if options.drop_duplicates:
        opened, dropped = without_duplicates(opened, run, memory)
    on_plan(len(opened.items))
    receipts: list[Receipt] = []
    kept = 0
    for receipt, was_there in run(write_shard, plan(opened, store, options, memory)):
        # One that a task has written, and whose machine then died, was not there before.
        was_before = was_there and receipt_name(receipt.name) in receipts_before
        on_shard(receipt, was_before)
        receipts.append(receipt)
        kept += was_before
    receipts.sort(key=lambda receipt: receipt.name)
    left_out = [line for receipt in receipts for line in receipt.left_out]
    if len(left_out) == len(opened.items):
        raise UserError(
            f"{opened.description}: none of its {len(left_out)} images can be read: {left_out[0]}"
        )
    manifest = _finish(opened, store, options, receipts, dropped, identity)
    duplicates = dropped if options.drop_duplicates else duplicates_in(open_dataset(store.url))
    for name, lines in ((LEFT_OUT, left_out), (DUPLICATES, duplicates)):
        if lines:
            store.write(name, "".join(f"{line}\n" for line in lines).encode())
    _clean_up(store)
    changed = sum(receipt.changed for receipt in receipts)
    return Built(manifest, opened.warnings, kept, changed, _sum_up(receipts), left_out, duplicates)


def plan(source: Source, store: Store, options: Options, memory: int) -> Iterator[Shard]:
    """The shards to be written, in order."""
    order = np.argsort(hash64(options.seed, np.arange(len(source.items))), kind="stable")
    build = build_digest(store)
    bounds = cut(source.items["size"].to_numpy()[order], options.shard_bytes)
    for number, (first, last) in enumerate(itertools.pairwise(bounds.tolist())):
        items = source.items.take(order[first:last]).combine_chunks()
        digest = hashlib.sha256(_identity(str(source.reader), options))
        for batch in items.to_batches():
            digest.update(batch.serialize())
        name = f"shard-{number:06d}.tar"
        yield Shard(name, items, source.reader, store.url, options, memory, digest.hexdigest(), build)


def cut(sizes: npt.NDArray[np.int64], shard_bytes: int) -> npt.NDArray[np.int64]:
    """Where to cut a row of images, so that shards have about as many bytes each, and none is empty: int64[shards + 1]."""
    ends = np.cumsum(sizes)
    count = min(max(round(int(ends[-1]) / shard_bytes), 1), len(sizes))
    targets = ends[-1] * np.arange(1, count) / count
    inner = np.searchsorted(ends, targets) + 1
    return np.unique(np.concatenate([[0], inner, [len(sizes)]]))


# ---- the destination ------------------------------------------------------------------------------------------


def _identity(source: str, options: Options) -> bytes:
    """Of a build, in BUILDING: all that its bytes depend on."""
    tree = {"source": source, **asdict(options)}
    del tree["strict"]
    return json.dumps(tree, indent=2).encode() + b"\n"


def _place(url: str) -> str:
    """The same for the same place, however it is named."""
    store = open_store(url)
    return os.path.realpath(store.root) if store.is_local else f"{type(store.fs).__name__}:{store.root}"


def _check(source: str, store: Store, identity: bytes, overwrite: bool) -> None:
    """Refuse a destination that may not be written, before anything is."""
    if not source.startswith("synthetic:"):
        ours, theirs = f"{_place(store.url)}/", f"{_place(source)}/"
        if ours.startswith(theirs):
            raise UserError(f"{store.url} lies in the source itself: choose another destination")
        if theirs.startswith(ours):
            raise UserError(f"{source} lies in the destination itself: choose another destination")
    names = [name for name in store.names() if not _is_temporary(name)]
    if BUILDING in names:
        if store.read(BUILDING) != identity and not overwrite:
            raise UserError(
                f"{store.url}: a build of something else, or with other options, was begun there and not finished (see "
                f"{BUILDING}): the same command would go on with it, --overwrite starts anew"
            )
    elif MANIFEST in names:
        if not overwrite:
            raise UserError(
                f"{store.url} already has a dataset: choose another destination, or add --overwrite"
            )
        if b'"indexed":' in store.read(MANIFEST):  # in damaged ones too
            raise UserError(
                f"{store.url} was made by `maestream shards index`, and its tars may be the only ones: choose another "
                "destination"
            )
    elif names:
        raise UserError(
            f"{store.url} is not empty and not a dataset ({names[0]}, …): choose another destination"
        )


def _take(store: Store, identity: bytes) -> None:
    """From now on nobody takes it for a dataset. What a build of the same has done is kept, all else of ours goes."""
    names = store.names()
    if BUILDING in names and store.read(BUILDING) == identity:
        gone = [MANIFEST] if MANIFEST in names else []
    else:
        # It comes before all else, so that a kill here is recognised; the manifest goes first.
        store.write(BUILDING, identity)
        gone = sorted(filter(_is_ours, names), key=lambda name: name != MANIFEST)
    store.remove(gone)


def _finish(
    source: Source,
    store: Store,
    options: Options,
    receipts: list[Receipt],
    dropped: list[str],
    identity: bytes,
) -> Manifest:
    """Make a dataset of the shards that are done."""
    left_out = sum(len(receipt.left_out) for receipt in receipts)
    odd = _sum_up(receipts)
    receipts = [receipt for receipt in receipts if receipt.samples]
    columns = SHARDS_SCHEMA.names
    rows = [{name: getattr(receipt, name) for name in columns} for receipt in receipts]
    built = {
        "source": source.description,
        "seed": options.seed,
        "bytes": str(options.changes),
        "changed": sum(receipt.changed for receipt in receipts),
        "checked": options.check,
        "left_out": left_out,
        "duplicates_dropped": len(dropped),
        "odd": odd,
        "build": _digest(identity),
    }
    table = pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA)
    return write_dataset(store, table, sum(r.image_bytes for r in receipts), source.classes, built)


def _digest(identity: bytes) -> str:
    return hashlib.sha256(identity).hexdigest()[:16]


def _finished(store: Store, identity: bytes) -> Manifest | None:
    """The manifest, if this very build has written it, and was killed before it had cleaned up."""
    if not (store.exists(BUILDING) and store.exists(MANIFEST)) or store.read(BUILDING) != identity:
        return None
    try:
        manifest = open_dataset(store.url).manifest
    except UserError:
        return None
    return manifest if manifest.built.get("build") == _digest(identity) else None


def _clean_up(store: Store) -> None:
    """Remove what a build that is finished has left, and what others had."""
    dataset = open_dataset(store.url)
    names = [dataset.shard_name(shard) for shard in range(dataset.manifest.shards)]
    used = {MANIFEST, SHARDS, CONTACT_SHEET, LEFT_OUT, DUPLICATES, *names, *map(index_name, names)}
    store.remove([name for name in store.names() if _is_ours(name) and name not in used])
    store.remove([BUILDING])


def _sum_up(receipts: Iterable[Receipt]) -> dict[str, int]:
    total: dict[str, int] = {}
    for receipt in receipts:
        for kind, count in receipt.odd.items():
            total[kind] = total.get(kind, 0) + count
    return dict(sorted(total.items()))


def _is_temporary(name: str) -> bool:
    return PurePosixPath(name).name.startswith(TEMPORARY)


def _is_ours(name: str) -> bool:
    """Whether a build may remove it: nothing of other datasets that lie further down."""
    folder, _, base = name.rpartition("/")
    if folder == "":
        return (
            name in (MANIFEST, SHARDS, CONTACT_SHEET, LEFT_OUT, DUPLICATES)
            or fnmatch(base, "shard-*.tar")
            or _is_temporary(base)
        )
    if folder == BUILDING_FOLDER:
        return True
    return folder == "index" and (fnmatch(base, "shard-*.parquet") or _is_temporary(base))
