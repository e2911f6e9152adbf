"""Rows of the generation tasks: damaged ones are named, never learned from, and read in no time; which ones a limit keeps."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adakron.config import DataConfig, TrainingConfig
from adakron.errors import DataError
from adakron.tasks import create_task
from adakron.tasks.causal import PairTask
from tests.helpers.tiny import byte_tokenizer, write_jsonl

TRIPLES = [["a", "R", "b"]]
WEB = {"triples": TRIPLES, "texts": ["x"], "comments": ["good"], "seen_category": True}


def task_of(name: str, file: Path) -> PairTask:
    task = create_task(DataConfig(task_name=name, test_file=str(file)), TrainingConfig())
    assert isinstance(task, PairTask)
    return task


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("webnlg_2017", WEB | {"seen_category": "False"}, "seen_category is 'False'; it must be true or false"),
        ("webnlg_2017", WEB | {"seen_category": None}, "seen_category is None; it must be true or false"),
        ("webnlg_2017", WEB | {"triples": [["a", None, "b"]]}, "triples is .*none of them null"),
        ("webnlg_2017", WEB | {"texts": [["x"]]}, r"texts holds \['x'\] .*every one must be a text"),
        ("dart", {"tripleset": TRIPLES, "annotations": ["x"]}, "annotations is .* it must be a list of"),
        ("dart", {"tripleset": TRIPLES, "annotations": [None]}, "annotations is .* it must be a list of"),
        ("dart", {"tripleset": TRIPLES, "annotations": [{"text": 5}]}, "annotations holds 5; every one must be a text"),
    ],
)
def test_what_is_no_text_or_no_truth_is_named(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"row 0: {message}"):
        task_of(name, write_jsonl(tmp_path / "test.jsonl", [row])).splits()


def test_a_text_that_is_null_is_no_reference(tmp_path: Path) -> None:
    row = WEB | {"texts": [None, " y "], "comments": ["good", "good"]}
    prompts = task_of("webnlg_2017", write_jsonl(tmp_path / "test.jsonl", [row])).prompts("test", byte_tokenizer())
    assert prompts.references == [["y"]]


def test_a_long_white_space_is_read_at_once(tmp_path: Path) -> None:
    # A search that tries every way to part the space would not end.
    rows = [{"meaning_representation": f"name[A]{' ' * 5000}{rest}", "human_reference": "x"} for rest in (", area[B]", "area")]
    task = task_of("e2e_nlg", write_jsonl(tmp_path / "good.jsonl", rows[:1]))
    assert task.splits()["test"]["source"][:] == ["name : A | area : B"]
    with pytest.raises(DataError, match="must read like name"):
        task_of("e2e_nlg", write_jsonl(tmp_path / "bad.jsonl", rows[1:])).splits()


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("name[X] , area [ Y ],", "name : X | area : Y"),
        ("name[X]area[a, b]", "name : X | area : a, b"),
        ("name[]", "name : "),
        ("name[X", None),
        ("a, b[Y]", None),
        ("[X]", None),
        ("name[a[b]c]", None),
    ],
)
def test_forms_of_a_meaning_representation(tmp_path: Path, text: str, source: str | None) -> None:
    task = task_of("e2e_nlg", write_jsonl(tmp_path / "test.jsonl", [{"meaning_representation": text, "human_reference": "x"}]))
    if source is None:
        with pytest.raises(DataError, match=r"meaning_representation is .*; it must read like name\[X\], area\[Y\]"):
            task.splits()
    else:
        assert task.splits()["test"]["source"][:] == [source]


def test_a_parquet_file_without_rows_is_named(tmp_path: Path) -> None:
    empty = pa.table({name: pa.array([], pa.string()) for name in ("source", "target")})
    pq.write_table(empty, tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"test\.parquet holds no rows; it must hold at least one example"):
        task_of("pairs", tmp_path / "test.parquet").splits()


def test_a_limit_keeps_sources_with_all_their_references(tmp_path: Path) -> None:
    rows = [{"source": source, "target": target} for source, target in (("a", "1"), ("b", "2"), ("a", "3"), ("c", "4"), ("b", "5"))]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    settings = DataConfig(
        task_name="pairs",
        train_file=file,
        validation_file=file,
        test_file=file,
        max_train_samples=2,
        max_eval_samples=1,
        max_predict_samples=2,
    )
    task = create_task(settings, TrainingConfig())
    assert isinstance(task, PairTask)
    found = task.prompts("test", byte_tokenizer())
    assert (found.sources, found.references) == (["a", "b"], [["1", "3"], ["2", "5"]])
    assert task.split("validation")["target"][:] == ["1", "3"]
    assert task.split("train")["target"][:] == ["1", "2"]  # examples, for an example is what is learned from
