"""Parquet files as a source: one column with the images' bytes and one with labels, like datasets on the Hugging Face Hub.

A row's image is `bytes`, or a struct with `bytes` and `path`. Columns are compressed per row group, so reading one image
costs a whole row group. Therefore the images of each file are first extracted ("spooled") to a plain file:

    DEST/building/part-00000.bin       the images, one after another
    DEST/building/part-00000.parquet   where each image is (SPOOL_SCHEMA). Its metadata key `of` has name and size of the
                                       Parquet file, so that a resumed build keeps it only for the same file
"""

import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.build import imagenet
from pipeline.build.image_table import ITEMS, RangeReader, Source, make_source
from pipeline.dataset.labels import LabelCollector
from pipeline.dataset.manifest import BUILDING, BUILDING_FOLDER, NO_LABEL
from pipeline.errors import UserError
from pipeline.parallel import ParallelMap
from pipeline.storage.parquet import parse_parquet, to_parquet
from pipeline.storage.ranged_file import RangedFile
from pipeline.storage.store import Store, open_shared, open_store

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "bytes")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
BATCH_ROWS = 64  # rows in memory at once
READ_BYTES = 1 << 20  # of a column are read at once
# ITEMS with labels as text, "" for none.
SPOOL_SCHEMA = pa.schema([pa.field("label", pa.string()) if f.name == "label" else f for f in ITEMS])


def parquet_source(
    store: Store, names: list[str], open_spool: Callable[[], Store], run: ParallelMap
) -> Source:
    """The images of these Parquet files. UserError if no column contains images.

    `open_spool`: see `pipeline.build.sources.open_source`.
    """
    splits = sorted({name.rpartition("/")[2].partition("-")[0] for name in names if "-of-" in name})
    if len(splits) > 1:
        raise UserError(
            f"{store.url} has files of several splits in it ({', '.join(splits)}): choose one, such as "
            f"{store.describe(f'{splits[0]}-*.parquet')}"
        )
    first = _open(store, names[0])
    _columns(store.describe(names[0]), first.schema_arrow)
    class_names = _class_names(first)
    url = open_spool().url
    jobs = [_SpoolJob(store.url, name, url, number) for number, name in enumerate(names)]
    for _ in run(spool_images, jobs):
        pass
    collector = LabelCollector()
    tables: list[pa.Table] = []
    texts: list[str] = []
    for job in jobs:
        table = job.read_result()
        assert table is not None
        labels = table["label"].to_pylist()
        collector.add(labels, functools.partial(_place, store.describe(job.name), table))
        texts += labels
        tables.append(table.replace_schema_metadata())
    encoder = collector.encoder()
    if encoder.first_problem:
        raise UserError(encoder.first_problem)
    if encoder.kind != "class":
        raise UserError(f"{store.url}: labels that are not one class for each image cannot be built yet")
    encoded = encoder.encode(texts)
    items = pa.concat_tables(tables).set_column(1, ITEMS.field("label"), encoded)
    classes = encoder.classes
    if classes and not encoder.by_name and len(class_names) >= len(classes):
        # ImageNet on the Hub has the classes as English words, in the order of their wnids.
        is_imagenet = len(class_names) == len(imagenet.wnids()) and class_names[0].startswith("tench")
        classes = list(imagenet.wnids()) if is_imagenet else class_names
    if classes and all(imagenet.WNID.fullmatch(name) for name in classes):
        keys = [
            f"{classes[label]}/{key}" if label != NO_LABEL else key
            for key, label in zip(items["key"].to_pylist(), encoded.to_pylist(), strict=True)
        ]
        items = items.set_column(0, "key", pa.array(keys))
    return make_source(store.url, classes, RangeReader(url), items)


def _place(where: str, table: pa.Table, i: int) -> str:
    return f"{where}: {table['key'][i].as_py()}"


@dataclass(frozen=True)
class _SpoolJob:
    """One Parquet file to extract. The input of one task."""

    url: str
    name: str
    spool_url: str
    number: int

    @property
    def part(self) -> str:
        return f"{BUILDING_FOLDER}/part-{self.number:05d}"

    def read_result(self) -> pa.Table | None:
        """Where the images are (SPOOL_SCHEMA); None if they have not been extracted."""
        spool = open_store(self.spool_url, already_reached=True)
        name = f"{self.part}.parquet"
        try:
            data = spool.read(name)
        except FileNotFoundError:
            return None
        table = parse_parquet(spool.describe(name), data, SPOOL_SCHEMA, SPOOL_SCHEMA.names)
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
        return table if metadata.get(b"of") == self.tag() else None

    def tag(self) -> bytes:
        """Identifies the Parquet file: its name and size."""
        return json.dumps([self.name, open_store(self.url, already_reached=True).size(self.name)]).encode()


def spool_images(job: _SpoolJob) -> None:
    """Extract the images of a Parquet file, unless that was done before. UserError if the file is damaged."""
    if job.read_result() is not None:
        return
    store, spool = open_store(job.url, already_reached=True), open_shared(job.spool_url, BUILDING)
    file = _open(store, job.name)
    image, label = _columns(store.describe(job.name), file.schema_arrow)
    rows: list[dict[str, Any]] = []
    offset = 0
    with spool.staging(f"{job.part}.bin") as path, path.open("wb") as out:
        for value, text in _values(store, job.name, file, image, label):
            data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            if not data:
                raise UserError(f"{store.describe(job.name)}: row {len(rows)} has no image")
            stem = PurePosixPath(name).stem.replace(".", "_") if name else ""
            key = stem or f"{PurePosixPath(job.name).stem.replace('.', '_')}-{len(rows):06d}"
            out.write(data)
            rows.append(
                {
                    "key": key,
                    "label": "" if text in (None, NO_LABEL) else str(text),
                    "file": f"{job.part}.bin",
                    "offset": offset,
                    "size": len(data),
                }
            )
            offset += len(data)
    table = pa.Table.from_pylist(rows, schema=SPOOL_SCHEMA).replace_schema_metadata({"of": job.tag()})
    spool.write(f"{job.part}.parquet", to_parquet(table))


def _values(
    store: Store, name: str, file: pq.ParquetFile, image: str, label: str | None
) -> Iterator[tuple[Any, Any]]:
    """Yield each row's image and label (None without a label column). UserError if the file is damaged."""
    try:
        for batch in file.iter_batches(
            BATCH_ROWS, columns=[image, *([label] if label else [])], use_threads=False
        ):
            images = batch.column(image).to_pylist()
            labels = batch.column(label).to_pylist() if label else [None] * len(images)
            yield from zip(images, labels, strict=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{store.describe(name)} is damaged ({error}): copy it again") from None


def _columns(where: str, schema: pa.Schema) -> tuple[str, str | None]:
    """Return the names of the image column and the label column."""
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        raise UserError(
            f"{where} has no image column (expected {', '.join(IMAGE_COLUMNS)}; it has {', '.join(schema.names)})"
        )
    kind = schema.field(image).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"{where}: the column {image} has the type {schema.field(image).type}, expected the images' bytes"
        )
    return image, next((name for name in LABEL_COLUMNS if name in schema.names), None)


def _class_names(file: pq.ParquetFile) -> list[str]:
    """The class names in the metadata that Hugging Face's `datasets` writes, or []."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        label = next(features[name] for name in LABEL_COLUMNS if name in features)
        return [str(name) for name in label["names"]]
    except (KeyError, ValueError, TypeError, StopIteration):
        return []


def _open(store: Store, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            pa.PythonFile(RangedFile(store, name, window=0), mode="r"),
            pre_buffer=False,
            buffer_size=READ_BYTES,
        )
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{store.describe(name)} is damaged or not a Parquet file ({error}): copy it again"
        ) from None
