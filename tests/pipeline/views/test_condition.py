"""`shards view --where`: SQL, with pandas as the oracle."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.views.condition import Condition

NUMBERS, TEXTS = ("width", "height", "score"), ("label", "caption")
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "<>": operator.ne,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
WORDS = ("dog", "cat", "it's", "", "Dog", "naïve")
Oracle = Callable[[pd.DataFrame], pd.Series]  # dtype boolean, with NA for NULL
Pair = tuple[str, Oracle]  # SQL, and what it means


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@st.composite
def numbers(draw: st.DrawFn) -> tuple[str, Callable[[pd.DataFrame], Any]]:
    """A number in SQL: a column, a constant, or a sum of both."""
    name, constant = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from([0, 1, 2, 5, -3, 0.5, 2.25]))
    form = draw(st.sampled_from(["column", "constant", "sum"]))
    if form == "column":
        return name, lambda df: df[name]
    if form == "constant":
        return repr(constant), lambda df: pd.Series(constant, df.index, dtype="Float64")
    return f"({name} + {constant!r})", lambda df: df[name] + constant


@st.composite
def comparisons(draw: st.DrawFn) -> Pair:
    form = draw(st.sampled_from(["numbers", "text", "in", "null", "between", "flag", "like"]))
    if form == "numbers":
        (a, left), (b, right), sign = draw(numbers()), draw(numbers()), draw(st.sampled_from(list(OPERATORS)))
        return f"{a} {sign} {b}", lambda df: OPERATORS[sign](left(df), right(df))
    if form == "between":
        name, low, high = draw(st.sampled_from(NUMBERS)), draw(st.integers(0, 4)), draw(st.integers(0, 6))
        return f"{name} BETWEEN {low} AND {high}", lambda df: (df[name] >= low) & (df[name] <= high)
    if form == "flag":
        return "good", lambda df: df["good"]
    name, word = draw(st.sampled_from(TEXTS)), draw(st.sampled_from(WORDS))
    if form == "text":
        sign = draw(st.sampled_from(["=", "<>"]))
        return f"{name} {sign} {quoted(word)}", lambda df: OPERATORS[sign](df[name], word).astype("boolean")
    if form == "like":
        return f"{name} like {quoted(word + '%')}", lambda df: df[name].str.startswith(word).astype("boolean")
    if form == "null":
        name, negated = draw(st.sampled_from([*NUMBERS, *TEXTS, "good"])), draw(st.booleans())
        if negated:
            return f"{name} IS NOT NULL", lambda df: df[name].notna().astype("boolean")
        return f"{name} IS NULL", lambda df: df[name].isna().astype("boolean")
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
    listed = ", ".join(map(quoted, words))
    return f"{name} in ({listed})", lambda df: df[name].isin(words).astype("boolean").mask(df[name].isna())


def combined(parts: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    both = st.tuples(parts, parts)
    return st.one_of(
        both.map(lambda two: (f"({two[0][0]}) and {two[1][0]}", lambda df: two[0][1](df) & two[1][1](df))),
        both.map(lambda two: (f"({two[0][0]} OR {two[1][0]})", lambda df: two[0][1](df) | two[1][1](df))),
        parts.map(lambda one: (f"NOT ({one[0]})", lambda df: ~one[1](df))),
    )


conditions = st.recursive(comparisons(), combined, max_leaves=6)
rows = st.fixed_dictionaries(
    {
        "width": st.integers(0, 5),
        "height": st.integers(0, 5),
        "score": st.none() | st.sampled_from([0.0, 0.5, 2.25, 5.0, -3.0, float("nan")]),
        "label": st.none() | st.sampled_from(WORDS),
        "caption": st.none() | st.sampled_from(WORDS),
        "good": st.none() | st.booleans(),
    }
)
SCHEMA = pa.schema(
    [
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("score", pa.float64()),
        ("label", pa.string()),
        ("caption", pa.string()),
        ("good", pa.bool_()),
    ]
)


def in_pandas(table: pa.Table) -> pd.DataFrame:
    """With NA for what is missing, NaN included."""
    kinds = {"width": "Int64", "height": "Int64", "score": "Float64", "good": "boolean"}
    values = {n: [None if v != v else v for v in table[n].to_pylist()] for n in table.column_names}
    return pd.DataFrame({n: pd.array(v, dtype=kinds.get(n, "string")) for n, v in values.items()})


@settings(max_examples=80)
@given(conditions, st.lists(rows, max_size=12))
def test_a_condition_selects_what_pandas_selects(condition: Pair, content: list[dict[str, Any]]) -> None:
    sql, oracle = condition
    table = pa.Table.from_pylist(content, schema=SCHEMA)
    expected = oracle(in_pandas(table)).fillna(False).to_numpy(dtype=bool)
    np.testing.assert_array_equal(Condition(sql).mask(table), expected, err_msg=sql)


TABLE = pa.table({"key": ["a", "b"], "label": ["dog", None], "width": pa.array([1, 2], pa.int32())})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "widht > 1",
            r"there is no column widht. The columns are key \(text\), label \(text\), width \(number\)",
        ),
        ('"widht" > 1', "there is no column widht"),
        ("width >", "syntax error"),
        ("", "For example: width >= 256"),
        ("width > 1, true", "only a single expression"),
        ("1 = 1; drop table x", "more than one statement"),
        ("width > 1) from x; select (1", "syntax error"),
        ("width", "is INTEGER, not true or false"),
        ("width > 'abc'", "Could not convert string 'abc'"),
        ("label = 3", "Could not convert string 'dog'"),
        ("count(*) > 1", "cannot contain aggregates"),
        ("row_number() over () = 1", "cannot contain window functions"),
        ("random() < 0.5", r"calls random\(\)"),
        ("key in (select content from read_text('/etc/passwd'))", "has a subquery"),
        ("__import__('os') = 1", "does not exist"),
    ],
)
def test_what_is_not_a_condition_is_one_message(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        Condition(text).mask(TABLE)
    assert "\n" not in str(refused.value)


def test_texts_may_contain_words_of_sql() -> None:
    assert Condition("label <> 'select random()'").mask(TABLE).tolist() == [True, False]
