"""What labels mean is decided from all of them, and a label that contradicts the others is named with its place."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.fields import label_value
from pipeline.dataset.labels import LabelCollector, LabelEncoder
from pipeline.dataset.manifest import NO_LABEL, LabelKind


def encoder_of(values: list[object], kind: LabelKind | None = None) -> LabelEncoder:
    collector = LabelCollector(kind)
    texts = [label_value(value) for value in values]
    for first in range(0, len(texts), 3):  # as of several files
        part = texts[first : first + 3]
        collector.add(part, lambda i, first=first: f"sample {first + i}")
    return collector.encoder()


def encoded(values: list[object], kind: LabelKind | None = None) -> tuple[LabelKind, list[str], list[object]]:
    encoder = encoder_of(values, kind)
    assert encoder.first_problem is None
    labels = encoder.encode([label_value(value) for value in values])
    return encoder.kind, encoder.classes, labels.to_pylist()


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([3.0, None, 1.0], None, ("class", ["0", "1", "2", "3"], [3, NO_LABEL, 1])),
        (["dog", "", "cat"], None, ("class", ["cat", "dog"], [1, NO_LABEL, 0])),
        ([-1, 1, math.nan], None, ("class", ["0", "1"], [NO_LABEL, 1, NO_LABEL])),
        ([[0, 2], [1.0], [], None, [-1]], None, ("classes", ["0", "1", "2"], [[0, 2], [1], [], None, None])),
        ([[5, 5, 1], 2], None, ("classes", [str(i) for i in range(6)], [[1, 5], [2]])),
        ([["dog", "cat"], "bee", []], None, ("classes", ["bee", "cat", "dog"], [[1, 2], [0], []])),
        ([["7", "dog"]], None, ("classes", ["7", "dog"], [[0, 1]])),
        ([[0, 1, 1], [0, 0, 1], [0, 0, 0]], None, ("classes", ["0", "1", "2"], [[1, 2], [2], []])),
        ([[0, 1], [1, 0]], None, ("classes", ["0", "1"], [[0, 1], [0, 1]])),  # nothing says that these are flags
        ([0.5, 2, None, -1], None, ("numbers", ["0"], [[0.5], [2.0], None, [-1.0]])),
        ([[0.5, 2], [3, 4]], None, ("numbers", ["0", "1"], [[0.5, 2.0], [3.0, 4.0]])),
        ([3, 5e9, -2], "numbers", ("numbers", ["0"], [[3.0], [5e9], [-2.0]])),
        (["0.5 1", "2, 3"], "numbers", ("numbers", ["0", "1"], [[0.5, 1.0], [2.0, 3.0]])),
        (["1 4 7", 2], "classes", ("classes", [str(i) for i in range(8)], [[1, 4, 7], [2]])),
        (["No Finding", "Mass|Edema", "Mass;"], "classes",
         ("classes", ["Edema", "Mass", "No Finding"], [[2], [0, 1], [1]])),
        ([0.5, 10, 9], "class", ("class", ["0.5", "9", "10"], [0, 2, 1])),
        (["1 4 7", 2, -1], "class", ("class", ["1 4 7", "2"], [0, 1, NO_LABEL])),
        ([[3], [1]], "class", ("class", ["0", "1", "2", "3"], [3, 1])),
        ([12_345_678, 7], "class", ("class", ["7", "12345678"], [1, 0])),
        ([None, ""], None, ("class", [], [NO_LABEL, NO_LABEL])),
        ([], "numbers", ("numbers", ["0"], [])),
    ],
)  # fmt: skip
def test_labels_of_each_kind(
    values: list[object], kind: LabelKind | None, expected: tuple[LabelKind, list[str], list[object]]
) -> None:
    assert encoded(values, kind) == expected


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (["1 4 7", "2", "3"], None, "sample 0: label 1 4 7 is a class name, but 2 of 3 labels are numbers"),
        (["2", "3", "3", "cat"], None, "sample 3: label cat is a class name, but 3 of 4 labels are numbers"),
        (["cat", "dog", "5"], None, "sample 2: label 5 is a number, but 2 of 3 labels are class names"),
        (["cat", "5"], None, "sample 1: label 5 is a number, but 1 of 2 labels is a class name"),
        (
            [1, 2, 5_000_000],
            None,
            "sample 2: label 5000000 is out of range: numbers of classes are 0 to 999999 (--label-kind n",
        ),
        ([1, 2, -2], None, "sample 2: label -2 is out of range"),
        ([[0.5, 1], [1, 2], [0.5]], None, "sample 2: label [0.5] has 1 number, but most labels have 2"),
        ([[1], 0.5], "classes", "sample 1: label 0.5 is not a whole number"),
        (
            [1, [0, 2]],
            "class",
            "sample 1: label [0, 2] is a list, and --label-kind class means one class for each image",
        ),
        (["cat", 1, 2], "numbers", "sample 0: label cat is a class name, but 2 of 3 labels are numbers"),
    ],
)
def test_the_label_that_contradicts_the_others_is_named(
    values: list[object], kind: LabelKind | None, message: str
) -> None:
    encoder = encoder_of(values, kind)
    assert message in (encoder.first_problem or "")
    good = [value for value in values if not encoder.problem(label_value(value))]
    assert len(good) < len(values)
    assert encoded(good, kind)[0] == encoder.kind  # the others are fine without it


def test_what_users_may_not_expect_is_said() -> None:
    assert "label 0.5 of sample 1 is not a whole number" in (encoder_of([1, 0.5]).note or "")
    assert "zeros and ones" in (encoder_of([[0, 1, 0], [1, 1, 0]]).note or "")
    assert [encoder_of(values).note for values in ([1, 2], ["a"], [[0, 2]])] == [None] * 3
    assert encoder_of([1, 0.5], "numbers").note is None


LABELS = st.lists(st.integers(0, 50) | st.sampled_from(["ant", "bee", "22.5x", "1 4 7"]), max_size=30)


@given(LABELS)
def test_the_majority_is_encoded_and_the_others_are_problems(values: list[object]) -> None:
    encoder = encoder_of(values)
    texts = [label_value(value) for value in values]
    good = [text for text in texts if not encoder.problem(text)]
    names = sum(isinstance(value, str) for value in values)
    assert len(good) == max(names, len(values) - names)
    assert (encoder.first_problem is None) == (len(good) == len(values))
    labels = encoder.encode(good).to_pylist()
    assert all(encoder.classes[label] == text for label, text in zip(labels, good, strict=True))


@given(st.lists(st.lists(st.integers(0, 20), max_size=6)))
def test_sets_of_classes_come_back(values: list[list[int]]) -> None:
    kind, classes, labels = encoded(values)
    bits = {tuple(sorted(Counter(v).items())) for v in values}
    is_flags = encoder_of(values).flags
    assert is_flags == (
        len({len(v) for v in values if v}) == 1
        and all(set(v) <= {0, 1} for v in values)
        and any(len(set(v)) < len(v) for v in values)
    ), bits
    assert kind == ("classes" if values else "class")
    if not is_flags:
        assert labels == [sorted(set(v)) for v in values]
        assert len(classes) == max((max(v) for v in values if v), default=-1) + 1
