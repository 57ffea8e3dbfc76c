"""Read and write small Parquet tables. Reading checks everything; damage is one `UserError`."""

import contextlib
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError

PART_ROWS = 1 << 16  # rows in memory at once where a column is read in parts


def parse_parquet(where: str, data: bytes | memoryview, schema: pa.Schema, columns: list[str]) -> pa.Table:
    """Read these columns of a Parquet file. Damage, or a missing value, is a UserError that names the file as `where`.

    Lists may be missing, but no value in a list.
    """
    with _damage_as_user_error(where):
        return _checked(_open_parquet(data).read(columns, use_threads=False), schema, columns)


def read_parquet(data: bytes | memoryview) -> pa.Table:
    """Read a whole Parquet file, which is known to be intact."""
    return _open_parquet(data).read(use_threads=False)


def parse_parquet_column(
    where: str, data: bytes | memoryview, schema: pa.Schema, column: str
) -> Iterator[pa.ChunkedArray]:
    """Like `parse_parquet` for one column, in parts of at most PART_ROWS rows, so that the whole column need not be in memory."""
    with _damage_as_user_error(where):
        for batch in _open_parquet(data).iter_batches(PART_ROWS, columns=[column], use_threads=False):
            yield _checked(pa.Table.from_batches([batch]), schema, [column])[column]


def _open_parquet(data: bytes | memoryview) -> pq.ParquetFile:
    # pq.read_table would leave Arrow's threads running, and a process that exits soon after sometimes aborts
    # ("terminate called without an active exception").
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, pre_buffer=False)


def _checked(table: pa.Table, schema: pa.Schema, columns: list[str]) -> pa.Table:
    table = table.select(columns).cast(pa.schema([schema.field(name) for name in columns]))
    table.validate(full=True)
    values = {c: pc.list_flatten(table[c]) if pa.types.is_list(table[c].type) else table[c] for c in columns}
    if missing := [c for c in columns if values[c].null_count]:
        raise ValueError(f"no values for {', '.join(missing)}")
    return table


@contextlib.contextmanager
def _damage_as_user_error(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # pyarrow raises any of these
        what = " ".join(str(error).split())
        raise UserError(f"{where} is damaged ({what}): copy or build the dataset again") from None


def to_parquet(table: pa.Table) -> bytes:
    """Return the table as a Parquet file with page checksums."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()
