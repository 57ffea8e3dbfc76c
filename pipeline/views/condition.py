"""A condition on samples, in SQL: `width >= 256 and label in ('dog', 'cat')`.

DuckDB parses and evaluates it. It gets one expression over the columns of one shard at a time, so what needs other rows
(aggregates, window functions, subqueries) and what is not a function of its arguments (random) is refused. DuckDB may not
read files or load extensions.
"""

import re

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError

CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "lock_configuration": "true",
    "threads": 1,
}


class Condition:
    """A parsed condition. UserError if the text is not one SQL expression.

    Not thread-safe.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.duckdb = duckdb.connect(":memory:", config=CONFIG)
        try:
            self.expression = duckdb.SQLExpression(text)
        except duckdb.Error as error:
            raise UserError(
                f"{self}: {_first_line(error)}. For example: width >= 256 and label = 'dog'"
            ) from None
        self._refuse_what_needs_other_rows()

    def __str__(self) -> str:
        return f"the condition {self.text!r}"

    def _refuse_what_needs_other_rows(self) -> None:
        plain = re.sub(
            r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"", "", str(self.expression)
        )  # without texts and names
        if re.search(r"\bselect\b", plain, re.IGNORECASE):
            raise UserError(f"{self} has a subquery: it may use only the columns of one sample")
        variable = self.duckdb.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
        ).fetchall()
        called = {name.lower() for name in re.findall(r"(\w+)\s*\(", plain)}
        if names := sorted(called & {name for (name,) in variable}):
            raise UserError(
                f"{self} calls {names[0]}(), whose result differs from call to call (for a random part, use --fraction)"
            )

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Which rows the condition holds for: bool[rows]. As in SQL, it does not hold if it is NULL.

        Missing values are NULL, and so is NaN.
        UserError if the condition does not fit the columns, or is not true or false.
        """
        relation = self.duckdb.from_arrow(_nan_as_null(table))
        try:
            relation.filter(self.expression)  # refuses aggregates and window functions
            result = relation.select(self.expression)
            if [str(kind) for kind in result.types] != ["BOOLEAN"]:
                kinds = ", ".join(str(kind) for kind in result.types)
                raise UserError(f"{self} is {kinds}, not true or false: compare it with something")
            values = result.to_arrow_table().column(0)
        except duckdb.Error as error:
            columns = ", ".join(f"{f.name} ({_kind(f.type)})" for f in table.schema)
            raise UserError(f"{self}: {_first_line(error)}. The columns are {columns}") from None
        return np.asarray(pc.fill_null(values, False).to_numpy(), np.bool_)


def _nan_as_null(table: pa.Table) -> pa.Table:
    """DuckDB takes NaN for larger than every number."""
    for place, field in enumerate(table.schema):
        if pa.types.is_floating(field.type):
            column = table[field.name]
            missing = pc.is_nan(column)
            table = table.set_column(place, field, pc.if_else(missing, pa.scalar(None, field.type), column))
    return table


def _kind(kind: pa.DataType) -> str:
    """The kind of a column, for a message."""
    if pa.types.is_list(kind):
        return f"list of {_kind(kind.value_type)}s"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return "true or false" if pa.types.is_boolean(kind) else "number"


def _first_line(error: Exception) -> str:
    """DuckDB's message: "no column widht", or its first line."""
    line = str(error).splitlines()[0]
    if found := re.search(r'Referenced column "(.*)" not found', line):
        return f"there is no column {found[1]}"
    return line.partition(": ")[2] or line
