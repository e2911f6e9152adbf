import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adakron.config import DataConfig, TrainingConfig
from adakron.errors import DataError
from adakron.tasks import create_task
from adakron.tasks.base import Task
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
    task.write_predictions("validation", np.array([[0.0, 1.0, 0.0]]), tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text(encoding="utf-8") == "index\tprediction\n0\tlevel\n"


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
