from decimal import Decimal
from typing import Any

import datasets
import pytest

from adakron.tasks.labels import LabelRule, as_number, check_split, class_name, class_names, looks_like_regression
from adakron.tasks.sources import RawSplit

BINARY = LabelRule(problem="classification", column="label", names=("no", "yes"))
SCORE = LabelRule(problem="regression", column="label", low=0.0, high=5.0)
NUMBER = LabelRule(problem="regression", column="label")
OWN = LabelRule(problem="classification", column="label", names=("-1", "1"), indices=False)


def check(labels: list[Any] | None, rule: LabelRule = BINARY, split: str = "train") -> tuple[list[Any] | None, list[str]]:
    count = 2 if labels is None else len(labels)
    columns: dict[str, list[Any]] = {"text": ["x"] * count} | ({} if labels is None else {"label": labels})
    dataset, problems = check_split(split, RawSplit(datasets.Dataset.from_dict(columns), f"{split} split"), ["text"], rule)
    if dataset is None:
        return None, problems
    return dataset["label"][:] if "label" in dataset.column_names else None, problems


@pytest.mark.parametrize("labels", [[0, 1], ["0", "1"], [0.0, 1.0], ["no", "yes"], [" no", "yes "]])
def test_class_indices_in_every_spelling(labels: list[Any]) -> None:
    assert check(labels) == ([0, 1], [])


def test_numbers_in_every_spelling() -> None:
    assert check([0, 5], SCORE) == ([0.0, 5.0], [])
    assert check(["2.5", "1e0"], SCORE) == ([2.5, 1.0], [])


@pytest.mark.parametrize(
    ("labels", "rule", "message"),
    [
        ([0, 2], BINARY, "train split, row 1: label is 2; it must be an integer from 0 to 1, or one of no, yes"),
        ([0, 1, -1, -1], BINARY, "train split, row 2: label is -1 (2 bad labels in all); it must be an integer from 0 to 1"),
        (["yes", "maybe"], BINARY, "row 1: label is 'maybe'; it must be"),
        ([0, None], BINARY, "row 1: label is None; it must be"),
        ([0.0, 0.5], BINARY, "row 1: label is 0.5; it must be"),
        ([0.0, 5.5], SCORE, "train split, row 1: label is 5.5; it must be a number from 0 to 5"),
        (["1.0", "high"], SCORE, "row 1: label is 'high'; it must be a number from 0 to 5"),
        ([1.0, float("nan")], SCORE, "row 1: label is nan; it must be"),
        (["1", "nan"], NUMBER, "row 1: label is 'nan'; it must be a finite number"),
        (["1", "inf", ""], NUMBER, "row 1: label is 'inf' (2 bad labels in all); it must be a finite number"),
        ([Decimal("1.5")], NUMBER, "row 0: label is Decimal('1.5') (of type Decimal); it must be a finite number"),
        ([[1]], BINARY, "row 0: label is [1] (of type list); it must be an integer from 0 to 1"),
        (["yes", " NaN"], BINARY, "row 1: label is ' NaN'; it must be"),
        (["no", "null"], BINARY, "row 1: label is 'null'; it must be"),
        (["1", "9" * 5000], OWN, f"row 1: label is '{'9' * 79}... (5002 characters); it must be one of"),
        (["1", "9" * 5000], BINARY, "(5002 characters); it must be an integer from 0 to 1"),
        (["1", "0"], OWN, "row 1: label is '0'; it must be one of the train split's: -1, 1"),
    ],
)
def test_a_bad_label_is_reported_with_row_value_and_rule(labels: list[Any], rule: LabelRule, message: str) -> None:
    found, problems = check(labels, rule)
    assert found is None
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], [float("nan")] * 2, ["", ""], ["nan", ""], ["-1", "-1"], None])
@pytest.mark.parametrize("rule", [BINARY, SCORE])
def test_a_test_split_may_be_unlabelled(labels: list[Any] | None, rule: LabelRule) -> None:
    assert check(labels, rule, "test") == (None, [])
    assert check(labels, rule, "validation")[1] != []


def test_a_partly_labelled_test_split_is_an_error() -> None:
    assert "row 1: label is -1; it must be" in check([0, -1], split="test")[1][0]


def test_minus_one_can_be_a_class_of_own_data() -> None:
    assert check([-1, 1, -1], OWN, "test") == ([0, 1, 0], [])


def test_texts_may_be_empty_but_not_null_and_not_numbers() -> None:
    rule = LabelRule(problem="classification", column="label", names=("a", "b"))

    def problems(texts: list[Any]) -> list[str]:
        rows = datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts)})
        return check_split("train", RawSplit(rows, "file.jsonl"), ["text"], rule)[1]

    assert problems(["", "x"]) == []
    assert problems(["x", None, None]) == ["file.jsonl, row 1: text is null (2 in all); it must be text, which may be empty"]
    assert problems([3, 4]) == ["file.jsonl, row 0: text is 3; it must be text"]
    assert problems([]) == ["file.jsonl holds no rows; it must hold at least one example"]


def test_a_json_column_of_texts_is_text() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", ""]}, features=datasets.Features(text=datasets.Json())).add_column("label", [0, 1])
    dataset, problems = check_split("train", RawSplit(rows, "a.jsonl"), ["text"], BINARY)
    assert problems == []
    assert dataset is not None
    assert dataset["text"][:] == ["a", ""]


def test_a_text_column_called_label_keeps_its_texts() -> None:
    rows = datasets.Dataset.from_dict({"label": ["x", "y"], "label_": ["v", "w"], "gold": ["no", "yes"]})
    rule = LabelRule(problem="classification", column="gold", names=("no", "yes"))
    dataset, problems = check_split("train", RawSplit(rows, ""), ["label", "label_"], rule)
    assert problems == []
    assert dataset is not None
    assert dataset[:] == {"label": ["x", "y"], "label_": ["v", "w"], "label__": [0, 1]}


def test_all_problems_of_a_split_are_told_at_once() -> None:
    rows = datasets.Dataset.from_dict({"sentence": ["x"], "gold": [1]})
    _, problems = check_split("train", RawSplit(rows, "train.csv"), ["text", "pair"], BINARY)
    assert [problem.split(" (")[0] for problem in problems] == [
        "train.csv has no column 'text'; it has sentence, gold",
        "train.csv has no column 'pair'; it has sentence, gold",
        "train.csv has no column 'label'; it has sentence, gold",
    ]


def test_only_needed_columns_remain() -> None:
    rows = datasets.Dataset.from_dict({"idx": [7], "text": ["x"], "label": [1]})
    dataset, _ = check_split("train", RawSplit(rows, ""), ["text"], BINARY)
    assert dataset is not None
    assert dataset[:] == {"text": ["x"], "label": [1]}


def test_class_names_are_sorted_by_number_or_alphabet() -> None:
    assert class_names([10, 9, 9, -1]) == class_names(["10", "9", " -1"]) == ("-1", "9", "10")
    assert class_names(["pos", "neg", "2"]) == ("2", "neg", "pos")
    assert class_names([True, False, None, "", "nan", "NULL", float("nan"), "9" * 5000, 10**5000]) == ("false", "true")
    assert class_names(["none", "nano", "9" * 300]) == ("9" * 300, "nano", "none")


def test_one_class_has_one_name() -> None:
    assert [class_name(value) for value in (1, 1.0, "1", True, "true", " x ", 1.5, "", None, [1])] == [
        "1", "1", "1", "true", "true", "x", None, None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "regression"),
    [
        ([0.5, 1.0], True),
        (["1", "2.5"], True),
        ([1, 2], False),
        (["1", "2"], False),
        (["a"], False),
        (["1.5", "x"], False),
        ([True], False),
        (["0.5", "nan", "1.0"], True),
        (["0.5", "", "inf", "-Infinity", None], True),
        ([0.5, float("nan"), float("inf"), None], True),
        (["1", "2", "nan", ""], False),
        ([1, None], False),
        (["", None, float("nan")], False),
        (["1_1", "2_1"], False),
        (["1", "9" * 5000], False),
    ],
)
def test_decimal_numbers_mean_regression(labels: list[Any], regression: bool) -> None:
    assert looks_like_regression(labels) is regression


def test_numbers_are_finite_and_written_as_in_data_files() -> None:
    assert [as_number(value) for value in ("1.5", " 2 ", "1_5", "nan", "inf", "9" * 5000, 10**400, True, None)] == [
        1.5, 2.0, None, None, None, None, None, None, None,
    ]  # fmt: skip
