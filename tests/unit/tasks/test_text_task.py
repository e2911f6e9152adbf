import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from adakron.config import DataConfig, TrainingConfig
from adakron.errors import ConfigError, DataError
from adakron.tasks import create_task
from adakron.tasks.base import Task
from adakron.tasks.classification import TextClassificationTask
from tests.helpers.letters import letter_tokenizer


def files(folder: Path, **splits: list[dict[str, Any]]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for split, rows in splits.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths[f"{split}_file"] = str(path)
    return paths


def task_of(saved: dict[str, Any] | None = None, **settings: Any) -> Task:
    return create_task(DataConfig(task_name="text", **settings), TrainingConfig(), model_options=saved)


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"id": index, "body": "a b", "label": label} for index, label in enumerate(labels)]


def test_string_labels_become_the_train_splits_classes_in_alphabetic_order(tmp_path: Path) -> None:
    task = task_of(**files(tmp_path, train=rows("up", "down", "level"), validation=rows("level")))
    options = task.model_options()
    assert options["id2label"] == {0: "down", 1: "level", 2: "up"}
    assert options["problem_type"] == "single_label_classification"
    encoded = task.encode("train", letter_tokenizer())
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [2, 0, 1]
    assert task.metric_for_best == "accuracy"
    assert set(task.score("validation", np.array([[0.0, 1.0, 0.0]]))) == {*task.metric_names, "loss"}
    task.write_predictions("validation", np.array([[0.0, 1.0, 0.0]]), tmp_path)
    assert (tmp_path / "predict_results_validation.tsv").read_text(encoding="utf-8") == "index\tprediction\n0\tlevel\n"


def test_integer_classes_need_not_start_at_zero(tmp_path: Path) -> None:
    task = task_of(**files(tmp_path, train=rows(10, 2, 2), validation=rows(10)))
    assert task.model_options()["id2label"] == {0: "2", 1: "10"}
    assert task.splits()["validation"]["label"][:] == [1]


def test_a_validation_class_that_training_lacks_is_an_error(tmp_path: Path) -> None:
    task = task_of(**files(tmp_path, train=rows("a", "b"), validation=rows("a", "c")))
    with pytest.raises(DataError, match=r"row 1: label is 'c'; it must be one of the train split's: a, b"):
        task.splits()


def test_limits_do_not_change_the_classes(tmp_path: Path) -> None:
    task = task_of(max_train_samples=1, **files(tmp_path, train=rows("a", "b", "c")))
    assert task.model_options()["num_labels"] == 3
    assert len(task.splits()["train"]) == 1


def test_decimal_labels_mean_regression_unless_told_otherwise(tmp_path: Path) -> None:
    paths = files(tmp_path, train=rows(0.5, 2.0), validation=rows(1.0, 2.5))
    task = task_of(**paths)
    assert task.model_options() == {"num_labels": 1, "problem_type": "regression"}
    assert task.metric_for_best == "pearson"
    assert set(task.score("validation", np.array([[1.0], [2.0]]))) == {*task.metric_names, "loss"}
    whole = files(tmp_path, train=rows(1.0, 2.0))
    assert task_of(problem="classification", **whole).model_options()["id2label"] == {0: "1", 1: "2"}
    assert task_of(problem="regression", **files(tmp_path, train=rows(1, 2))).model_options()["num_labels"] == 1


def test_pairs_by_column_names(tmp_path: Path) -> None:
    pairs = [{"left": "a", "right": "b c", "gold": label} for label in ("x", "y")]
    task = task_of(text_column="right", text_pair_column="left", label_column="gold", **files(tmp_path, train=pairs))
    encoded = task.encode("train", letter_tokenizer())
    assert encoded.features["input_ids"][:6].tolist() == [2, 5, 6, 3, 4, 3]


def test_the_first_column_with_words_is_the_text(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("label,id,body,more\nx,1,a b,c\ny,2,c,d\n", encoding="utf-8")
    splits = task_of(data_dir=str(tmp_path)).splits()
    assert splits["train"].column_names == ["body", "label"]
    assert task_of(data_dir=str(tmp_path), text_pair_column="body").splits()["train"].column_names == ["more", "body", "label"]


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    paths = files(tmp_path, train=rows("a", "b"))
    with pytest.raises(DataError, match=r"no column 'words'; it has id, body, label \(rename the column, or .* --text_column\)"):
        task_of(text_column="words", **paths).splits()
    with pytest.raises(DataError, match=r"no column 'gold'; it has id, body, label .*--label_column"):
        task_of(label_column="gold", **paths).splits()
    with pytest.raises(DataError, match=r"has no text column besides label; it has id, label \(set --text_column\)"):
        task_of(**files(tmp_path, train=[{"id": 1, "label": "a"}, {"id": 2, "label": "b"}])).splits()


def test_one_class_is_not_a_classification(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'label' holds 1 class \(3\); classification needs two or more.*--problem regression"):
        task_of(**files(tmp_path, train=rows(3, 3))).splits()


def test_classes_come_from_training_or_from_a_saved_run(tmp_path: Path) -> None:
    paths = files(tmp_path, test=[{"body": "a"}])
    with pytest.raises(DataError, match="takes its classes from the train split, and there is none; give --train_file"):
        task_of(**paths).splits()
    saved = {"num_labels": 2, "id2label": {"1": "no", "0": "yes"}, "problem_type": "single_label_classification"}
    task = task_of(saved, **paths)
    assert task.model_options()["id2label"] == {0: "yes", 1: "no"}
    assert task.encode("test", letter_tokenizer()).labels is None
    regression = task_of({"num_labels": 1, "problem_type": "regression"}, **paths)
    assert regression.model_options()["num_labels"] == 1


def test_own_sentences_for_the_quickstart_model(tmp_path: Path) -> None:
    paths = files(tmp_path, test=[{"sentence": "I never found it dull."}])
    splits = create_task(DataConfig(**paths), TrainingConfig()).splits()
    assert splits["test"]["sentence"][:] == ["I never found it dull."]
    assert len(splits["train"]) == 4000


def test_a_bad_cell_among_decimal_labels_is_a_bad_row(tmp_path: Path) -> None:
    for cell in ("nan", "inf", ""):
        (tmp_path / "train.csv").write_text(f"text,label\na b,0.5\nc,1.5\nd,{cell}\n", encoding="utf-8")
        with pytest.raises(DataError, match=rf"row 2: label is '{cell}'; it must be a finite number"):
            task_of(data_dir=str(tmp_path)).splits()


def test_a_missing_class_is_a_bad_row(tmp_path: Path) -> None:
    for cell in ("nan", "null", ""):
        (tmp_path / "train.csv").write_text(f"text,label\na b,x\nc,y\nd,{cell}\n", encoding="utf-8")
        with pytest.raises(DataError, match=rf"row 2: label is '{cell}'; it must be one of the train split's: x, y"):
            task_of(data_dir=str(tmp_path)).splits()
    with pytest.raises(DataError, match=r"row 1: label is None; it must be a class: a word, .*--label_column"):
        task_of(**files(tmp_path, train=rows("x", None))).splits()


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ([1], r"\[1\] \(of type list\)"),
        ({"a": 1}, r"\{'a': 1\} \(of type dict\)"),
        (datetime.date(2020, 1, 2), r"datetime.date\(2020, 1, 2\) \(of type date\)"),
        (Decimal("1.5"), r"Decimal\('1.5'\) \(of type Decimal\)"),
    ],
)
def test_labels_of_other_types_are_shown(tmp_path: Path, label: Any, shown: str) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [label] * 2}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=f"row 0: label is {shown}; it must be a class: a word, a whole number, true or false "):
        task_of(data_dir=str(tmp_path)).splits()
    with pytest.raises(DataError, match=rf"row 0: label is {shown} \(2 bad labels in all\); it must be a finite number"):
        task_of(data_dir=str(tmp_path), problem="regression").splits()


def test_texts_of_mixed_types_are_shown(tmp_path: Path) -> None:
    mixed = [{"id": 1, "text": text, "label": label} for text, label in (("a", "x"), (5, "y"))]
    with pytest.raises(DataError, match=r"row 1: text is 5; it must be text"):
        task_of(**files(tmp_path, train=mixed)).splits()


def test_a_column_of_mixed_types_without_words_is_not_the_text(tmp_path: Path) -> None:
    mixed = [{"meta": meta, "tags": ["t"], "text": "a", "label": label} for meta, label in (({"n": 1}, "x"), (5, "y"))]
    assert task_of(**files(tmp_path, train=mixed)).splits()["train"].column_names == ["text", "label"]


def test_an_id_column_with_a_gap_is_not_the_text(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("id,text,label\n1,a b,x\n,c,y\n", encoding="utf-8")
    assert task_of(data_dir=str(tmp_path)).splits()["train"].column_names == ["text", "label"]


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"text_column": "label"}, "text_column and label_column"),
        ({"text_column": "gold", "label_column": "gold"}, "text_column and label_column"),
        ({"text_pair_column": "label"}, "text_pair_column and label_column"),
        ({"text_column": "body", "text_pair_column": "body"}, "text_column and text_pair_column"),
    ],
)
def test_a_column_has_one_use(settings: dict[str, Any], fields: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{fields} name the same column '\w+'; a column has one use \(set --"):
        task_of(**settings)


def test_a_text_column_called_label(tmp_path: Path) -> None:
    data = [{"label": text, "labels": label} for text, label in (("a b", "y"), ("c", "x"))]
    task = task_of(text_column="label", label_column="labels", **files(tmp_path, train=data, test=[{"label": "a"}]))
    encoded = task.encode("train", letter_tokenizer())
    assert task.splits()["train"]["label"][:] == ["a b", "c"]
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [1, 0]
    assert encoded.lengths.tolist() == [4, 3]
    assert task.encode("test", letter_tokenizer()).labels is None


def test_a_saved_run_without_columns_and_files_takes_texts() -> None:
    saved = {"num_labels": 2, "id2label": {"0": "no", "1": "yes"}, "problem_type": "single_label_classification"}
    task = task_of(saved)
    assert isinstance(task, TextClassificationTask) and task.spec.text_columns == ("text",)


@pytest.mark.parametrize("columns", [{}, {"text_column": "review"}])
def test_a_saved_run_scores_other_data_without_a_train_split(tmp_path: Path, columns: dict[str, str]) -> None:
    (tmp_path / "other.csv").write_text("stars,review\n5,a b\n1,c\n", encoding="utf-8")
    settings = {"validation_file": str(tmp_path / "other.csv"), "label_column": "stars", **columns}
    saved = {"num_labels": 2, "id2label": {"0": "1", "1": "5"}, "problem_type": "single_label_classification"}
    task = task_of(saved, **settings)
    assert list(task.splits()) == ["validation"]
    assert task.splits()["validation"].column_names == ["review", "label"]
    assert task.score("validation", np.array([[0.0, 1.0], [1.0, 0.0]]))["accuracy"] == 1.0
    task = task_of({"num_labels": 1, "problem_type": "regression"}, **settings)
    assert list(task.splits()) == ["validation"]
    assert task.score("validation", np.array([[5.0], [1.0]]))["mse"] == 0.0


def test_whole_numbers_stay_classes_with_a_very_long_one_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(f"text,label\na b,1\nc,2\nd,{'7' * 5000}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"row 2: label is '7{79}\.\.\. \(5002 characters\); it must be one of the train split's: 1, 2"):
        task_of(data_dir=str(tmp_path)).splits()
