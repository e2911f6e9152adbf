"""Questions from files: which forms are read, and how what is wrong is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from adakron.config import DataConfig, TrainingConfig
from adakron.errors import ConfigError, DataError
from adakron.tasks import create_task
from tests.helpers.questions import CONTEXT, row, task_of


def test_nested_files_hold_the_same_questions_as_rows(tmp_path: Path) -> None:
    flat = task_of(tmp_path, [row("one", "c d", "c"), row("none")])
    answers = [{"text": "c d", "answer_start": 2}, {"text": "c", "answer_start": 2}]
    questions = [
        {"id": "one", "question": "a", "answers": answers, "is_impossible": False},
        {"id": "none", "question": "a", "answers": [], "plausible_answers": [{"text": "b", "answer_start": 0}], "is_impossible": True},
    ]
    nested = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": questions}]}]}
    (tmp_path / "nested.json").write_text(json.dumps(nested), encoding="utf-8")
    task = create_task(DataConfig(task_name="squad_v2", validation_file=str(tmp_path / "nested.json")), TrainingConfig())
    assert task.splits()["validation"].to_list() == flat.splits()["validation"].to_list()
    assert task.splits()["validation"][0]["answers"] == ["c d", "c"]


def test_a_json_list_of_rows_and_answers_one_by_one_are_read_too(tmp_path: Path) -> None:
    rows = [{"id": 7, "question": "a", "context": CONTEXT, "answers": [{"text": "d", "answer_start": 4}]}]
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    task = create_task(DataConfig(task_name="qa", validation_file=str(tmp_path / "list.json")), TrainingConfig())
    assert task.splits()["validation"].to_list() == [
        {"id": "7", "question": "a", "context": CONTEXT, "answers": ["d"], "answer_starts": [4]}
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("q", "c") | {"answers": {"text": ["c"], "answer_start": [3]}}, r"row 1: answer_start 3 gives ' ' and not the answer 'c'"),
        (row("q", "c") | {"answers": {"text": ["c"], "answer_start": [-5]}}, "an answer_start is -5"),
        (row("q", "c") | {"answers": {"text": ["c"], "answer_start": []}}, "lists of one length"),
        (row("q", "c") | {"answers": {"text": [" "], "answer_start": [1]}}, "an answer's text is ' '"),
        (row("q", "c") | {"context": " "}, "row 1: context is ' '; it must be a text"),
        (row("q", "c") | {"question": None}, "row 1: question is None; it must be a text"),
        (row("first", "c"), "id 'first' is an earlier row's"),
        (row("q"), "row 1: it has no answer; .*--version_2_with_negative"),
    ],
)
def test_a_bad_row_is_named(bad: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        task_of(tmp_path, [row("first", "d"), bad], "squad_v1").splits()


def test_a_damaged_nested_file_is_named(tmp_path: Path) -> None:
    for content, message in (
        ({"data": [{"paragraphs": [{"context": "b", "qas": [{"question": "a"}]}]}]}, "not as SQuAD nests it: no 'id'"),
        ({"data": [{"paragraphs": "b"}]}, "not as SQuAD nests it"),
        ({"data": []}, "holds no questions"),
    ):
        (tmp_path / "file.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            create_task(DataConfig(task_name="qa", validation_file=str(tmp_path / "file.json")), TrainingConfig()).splits()


def test_settings_of_other_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"null_score_diff_threshold is 1.0, but task squad_v1 has no questions without an answer"):
        task_of(tmp_path, [], "squad_v1", null_score_diff_threshold=1.0)
    with pytest.raises(ConfigError, match=r"version_2_with_negative is True, but task squad_v2 knows by itself"):
        task_of(tmp_path, [], "squad_v2", version_2_with_negative=True)
    with pytest.raises(ConfigError, match="doc_stride is 4, but task sst2 has no questions on a context"):
        create_task(DataConfig(task_name="sst2", doc_stride=4), TrainingConfig())
