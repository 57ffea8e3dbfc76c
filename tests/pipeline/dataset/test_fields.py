"""Options that choose fields, and what value can be a label."""

import json
import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.fields import Fields, label_value, parse_fields, parse_number, value_at
from pipeline.errors import UserError


def test_options_choose_fields() -> None:
    assert parse_fields() == Fields()
    fields = parse_fields(".rgb.jpg", "json:meta.label", "classes", "score, meta.tags.0,about=caption")
    assert fields == Fields(
        "rgb.jpg", "json:meta.label", "classes", ("score", "meta.tags.0", "about=caption")
    )
    assert fields.label_path == "meta.label"
    assert fields.columns == {"score": "score", "meta_tags_0": "meta.tags.0", "about": "caption"}
    assert parse_fields(label=".cls").label == "cls"
    assert parse_fields(label="cls").label_path is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": " "}, "--image is empty"),
        ({"label": "json:"}, "--label 'json:' names no field"),
        ({"kind": "multi"}, "--label-kind multi: expected class, classes, numbers"),
        ({"keep": ","}, "--keep-json is empty"),
        ({"keep": "width"}, "choose another name, such as --keep-json json_width=width"),
        ({"keep": "a,a"}, "two columns a"),
        ({"keep": "0"}, "letters, digits and underscores"),
        ({"keep": "x="}, "letters, digits and underscores"),
    ],
)
def test_options_that_are_not_valid(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_fields(**options)
    assert message in str(caught.value)


def test_paths_go_through_objects_lists_and_keys_with_dots() -> None:
    tree = {"a": {"b": [{"c": 1}, 2]}, "x.y": 3, "x": {"y": 4, "z": 5}}
    found = {path: value_at(tree, path) for path in ("a.b.0.c", "a.b.1", "x.y", "x.z", "a.b")}
    assert found == {"a.b.0.c": 1, "a.b.1": 2, "x.y": 3, "x.z": 5, "a.b": [{"c": 1}, 2]}
    for path in ("q", "a.b.2", "a.b.c", "a.b.1.d", "x.y.z"):
        with pytest.raises(KeyError):
            value_at(tree, path)


@given(st.integers(-(10**9), 10**9))
def test_all_ways_to_write_a_whole_number_are_the_same_label(number: int) -> None:
    same = [
        number,
        float(number),
        str(number),
        f" {number}.0 ",
        np.int64(number),
        np.float64(number),
        Decimal(number),
    ]
    assert {label_value(value) for value in [*same, pa.scalar(number), pa.scalar(float(number))]} == {
        str(number)
    }
    assert (
        label_value([number, float(number)])
        == f"[{number}, {number}]"
        == label_value(np.array([number, number]))
    )
    assert parse_number(str(number)) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_their_value(number: float) -> None:
    assert float(label_value(number)) == number
    assert float(label_value(repr(number))) == number
    assert json.loads(label_value([number])) == [number]
    assert float(parse_number(repr(number)) or 0) == number


@given(
    st.one_of(
        st.none(),
        st.just(math.nan),
        st.just(np.float32("nan")),
        st.just(""),
        st.just(" "),
        st.just(pa.scalar(None)),
    )
)
def test_missing_values_are_no_label(value: object) -> None:
    assert label_value(value) == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(JSON, st.booleans())
def test_any_json_value_is_a_label_or_has_a_reason_why_not(value: object, chosen: bool) -> None:
    """A label is printable, and reading it again gives the same label."""
    reason = None
    try:
        text = label_value(value, chosen)
    except ValueError as error:
        reason = str(error)
    if reason is None:
        assert text.isprintable()
        assert label_value(text) == text
    else:
        assert 0 < len(reason) < 250


@pytest.mark.parametrize(
    ("value", "label"),
    [("dog", "dog"), (b"cat", "cat"), ("n01.5", "n01.5"), ("1 4 7", "1 4 7"), ("[x]", "[x]"), ("007", "7"), (0.5, "0.5"),
     (["dog", "cat"], '["dog", "cat"]'), ([], "[]"), ("[0, 2.0]", "[0, 2]"), ((1, 0.5), "[1, 0.5]"), ({3, 1}, "[1, 3]"),
     ("1e3", "1000"), (["0", "2"], "[0, 2]"), ("bär", "bär")],
)  # fmt: skip
def test_values_as_labels(value: object, label: str) -> None:
    assert label_value(value) == label


@pytest.mark.parametrize(
    ("value", "reason"),
    [(True, "true may be a flag"), ({"id": 3, "name": "dog"}, "choose a field of it: id, name"), (math.inf, "infinite"),
     ([[1]], "a list in a list"), ([1, None], "is missing"), ([1, "a"], "numbers and texts"), ("a\0", "not printable"),
     (b"\xff", "not printable"), (object, "neither a number")],
)  # fmt: skip
def test_values_that_cannot_be_a_label(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        label_value(value)


def test_a_flag_is_a_label_if_its_field_was_named() -> None:
    assert [label_value(True, chosen=True), label_value(False, chosen=True)] == ["1", "0"]
    assert label_value([True, False], chosen=True) == "[1, 0]"
