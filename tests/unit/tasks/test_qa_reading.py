"""Questions from files: which forms are read, and how what is wrong is named."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adakron.config import DataConfig, TrainingConfig
from adakron.data.encoding import TokenTable
from adakron.errors import ConfigError, DataError
from adakron.tasks import create_task
from adakron.tasks.qa.labels import answer_positions
from tests.helpers.letters import letter_tokenizer
from tests.helpers.questions import CONTEXT, model, row, task_of


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


def test_an_answer_at_the_edge_of_a_context_may_have_characters_that_no_token_has() -> None:
    # Two windows of "?ab cd?", from which the tokenizer drops both question marks.
    table = TokenTable(
        features={
            "roles": np.array([2, 1, 1, 2, 1, 1]),
            "char_starts": np.array([-1, 1, 2, -1, 4, 5]),
            "char_ends": np.array([-1, 2, 3, -1, 5, 6]),
        },
        offsets=np.array([0, 3, 6]),
        truncated=0,
        rows=np.array([0, 0]),
    )
    none = [[0, 0], [0, 0]]
    for text, start, expected in (
        ("?ab", 0, [[1, 2], [0, 0]]), ("cd?", 4, [[0, 0], [1, 2]]), ("?ab c", 0, none), ("?", 0, none),
    ):  # fmt: skip
        assert answer_positions(table, [[text]], [[start]]).tolist() == expected, text


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
def test_a_threshold_that_no_json_can_hold_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"null_score_diff_threshold is .*; it must be a finite number"):
        DataConfig(task_name="squad_v2", null_score_diff_threshold=threshold)


def test_a_list_of_any_length_takes_no_more_memory_than_there_are_spans(tmp_path: Path) -> None:
    task = task_of(tmp_path, [row("a", "c"), row("b", "d e")], n_best_size=10**6)
    encoded = task.encode("validation", letter_tokenizer())
    batch = task.collate(encoded, range(len(encoded)), 0)
    logits = torch.randn(len(encoded), 2, batch["input_ids"].shape[1], generator=torch.Generator().manual_seed(0))
    outputs = task.predict(model(logits), batch).numpy()
    assert outputs.shape == (len(encoded), 4 * 8 + 3)
    task.write_predictions("validation", outputs, tmp_path / "out")
    (listed, _) = json.loads((tmp_path / "out" / "validation_nbest_predictions.json").read_text()).values()
    # Of the windows' 4, 4 and 3 tokens every pair in order, and no answer.
    assert len(listed) == 10 + 10 + 6 + 1
