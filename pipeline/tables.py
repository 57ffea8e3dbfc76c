"""Parquet files as a source of images: a column of their bytes, and one of labels, as datasets on hubs come.

Nothing can be read from the middle of a compressed column: a single image would cost all of its row group. So the
images of each file are first written one after another into a file of their own, and read from there.

    DEST/building/part-00000.bin       images
    DEST/building/part-00000.parquet   where each lies (ITEMS); labels are still texts; names file and bytes it is of
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import imagenet
from pipeline.ahead import Run
from pipeline.errors import UserError
from pipeline.foreign import Labels
from pipeline.items import ITEMS, Ranges, Source, make_source
from pipeline.manifest import BUILDING, BUILDING_FOLDER, NO_LABEL
from pipeline.parquet import parse_parquet, to_parquet
from pipeline.storage import Store, open_shared, open_store

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "bytes")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
BATCH_ROWS = 64  # in memory at once
READ_BYTES = 1 << 20  # of a column, at once
SPOOLED = pa.schema([pa.field("label", pa.string()) if f.name == "label" else f for f in ITEMS])


def parquet_source(store: Store, names: list[str], aside: Callable[[], Store], run: Run) -> Source:
    """UserError where no column looks like images."""
    splits = sorted({name.rpartition("/")[2].partition("-")[0] for name in names if "-of-" in name})
    if len(splits) > 1:
        raise UserError(
            f"{store.url} has files of several splits in it ({', '.join(splits)}): name one, as "
            f"{store.describe(f'{splits[0]}-*.parquet')}"
        )
    first = _open(store, names[0])
    _columns(store.describe(names[0]), first.schema_arrow)
    named = _class_names(first)
    url = aside().url
    jobs = [_Spool(store.url, name, url, number) for number, name in enumerate(names)]
    for _ in run(spool, jobs):
        pass
    labels, tables, texts = Labels(), [], []
    for job in jobs:
        table = job.done()
        assert table is not None
        for key, label in zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True):
            if problem := labels.problem(label):
                raise UserError(f"{store.describe(job.name)}: {key}: {problem}")
            texts.append(label)
        tables.append(table.replace_schema_metadata())
    coded = labels.code(texts)
    items = pa.concat_tables(tables).set_column(1, ITEMS.field("label"), coded)
    classes = labels.classes()
    if labels.numbers and len(named) >= len(classes):
        # The hub's ImageNet has its classes in words, in the order of their wnids.
        is_imagenet = len(named) == len(imagenet.wnids()) and named[0].startswith("tench")
        classes = list(imagenet.wnids()) if is_imagenet else named
    if classes and all(imagenet.WNID.fullmatch(name) for name in classes):
        keys = [
            f"{classes[label]}/{key}" if label != NO_LABEL else key
            for key, label in zip(items["key"].to_pylist(), coded.to_pylist(), strict=True)
        ]
        items = items.set_column(0, "key", pa.array(keys))
    return make_source(store.url, classes, Ranges(url), items)


@dataclass(frozen=True)
class _Spool:
    """One Parquet file, and where its images go."""

    url: str
    name: str
    aside: str
    number: int

    @property
    def part(self) -> str:
        return f"{BUILDING_FOLDER}/part-{self.number:05d}"

    def done(self) -> pa.Table | None:
        """The rows, if it was done before."""
        aside = open_store(self.aside, known=True)
        name = f"{self.part}.parquet"
        try:
            data = aside.read(name)
        except FileNotFoundError:
            return None
        table = parse_parquet(aside.describe(name), data, SPOOLED, SPOOLED.names)
        tags = pq.read_schema(io.BytesIO(data)).metadata or {}
        return table if tags.get(b"of") == self.tag() else None

    def tag(self) -> bytes:
        return json.dumps([self.name, open_store(self.url, known=True).size(self.name)]).encode()


def spool(job: _Spool) -> None:
    """Write the images of a Parquet file one after another, unless that was done before."""
    if job.done() is not None:
        return
    store, aside = open_store(job.url, known=True), open_shared(job.aside, BUILDING)
    file = _open(store, job.name)
    image, label = _columns(store.describe(job.name), file.schema_arrow)
    rows: list[dict[str, Any]] = []
    offset = 0
    with aside.staging(f"{job.part}.bin") as path, path.open("wb") as out:
        for value, text in _values(store, job.name, file, image, label):
            data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            if not data:
                raise UserError(f"{store.describe(job.name)}: row {len(rows)} has no image in it")
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
    table = pa.Table.from_pylist(rows, schema=SPOOLED).replace_schema_metadata({"of": job.tag()})
    aside.write(f"{job.part}.parquet", to_parquet(table))


def _values(
    store: Store, name: str, file: pq.ParquetFile, image: str, label: str | None
) -> Iterator[tuple[Any, Any]]:
    """Each row's image and label. UserError where the file is damaged."""
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
    """Names of the columns of images and of labels."""
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        raise UserError(
            f"{where} has no column of images (looked for {', '.join(IMAGE_COLUMNS)}; it has {', '.join(schema.names)})"
        )
    kind = schema.field(image).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"{where}: the column {image} has no bytes of images in it, but {schema.field(image).type}"
        )
    return image, next((name for name in LABEL_COLUMNS if name in schema.names), None)


def _class_names(file: pq.ParquetFile) -> list[str]:
    """What Hugging Face's datasets says of the label column's classes, if it does."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        label = next(features[name] for name in LABEL_COLUMNS if name in features)
        return [str(name) for name in label["names"]]
    except (KeyError, ValueError, TypeError, StopIteration):
        return []


def _open(store: Store, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            pa.PythonFile(_RangedReads(store, name), mode="r"), pre_buffer=False, buffer_size=READ_BYTES
        )
    except FileNotFoundError:
        raise UserError(f"{store.describe(name)}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{store.describe(name)} is no Parquet file, or damaged ({error}): copy it again"
        ) from None


class _RangedReads(io.RawIOBase):
    """An object as Parquet's reader wants it: by our own reads, which are retried."""

    def __init__(self, store: Store, name: str) -> None:
        super().__init__()
        self.store, self.name, self.size_, self.position = store, name, store.size(name), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size_}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(self.size_ - self.position, 0)
        data = self.store.read_range(self.name, self.position, left if size < 0 else min(size, left))
        self.position += len(data)
        return data
