"""Parquet that may be damaged: tables are checked when read, and what is wrong is one message."""

import contextlib
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError

PART_ROWS = 1 << 16  # are looked at at once, where not all need be in memory


def parse_parquet(where: str, data: bytes | memoryview, schema: pa.Schema, columns: list[str]) -> pa.Table:
    """These columns of a Parquet file, whole. UserError, with `where`, if it is damaged."""
    with _damage_named(where):
        return _checked(_open_parquet(data).read(columns, use_threads=False), schema, columns)


def parse_parquet_column(
    where: str, data: bytes | memoryview, schema: pa.Schema, column: str
) -> Iterator[pa.ChunkedArray]:
    """The same of one column, in parts, so that it is never in memory whole."""
    with _damage_named(where):
        for batch in _open_parquet(data).iter_batches(PART_ROWS, columns=[column], use_threads=False):
            yield _checked(pa.Table.from_batches([batch]), schema, [column])[column]


def _open_parquet(data: bytes | memoryview) -> pq.ParquetFile:
    # Not pq.read_table: it leaves Arrow's threads behind, and a process that ends soon after aborts now and
    # then ("terminate called without an active exception").
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, pre_buffer=False)


def _checked(table: pa.Table, schema: pa.Schema, columns: list[str]) -> pa.Table:
    table = table.select(columns).cast(pa.schema([schema.field(name) for name in columns]))
    table.validate(full=True)
    if missing := [c for c in table.column_names if table[c].null_count]:
        raise ValueError(f"no values for {', '.join(missing)}")
    return table


@contextlib.contextmanager
def _damage_named(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # pyarrow raises any of them
        what = " ".join(str(error).split())
        raise UserError(f"{where} is damaged ({what}): copy or build the dataset again") from None


def to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()
