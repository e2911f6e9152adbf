import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from adakron.tasks.glue import GLUE_TASKS
from adakron.tasks.scoring import TextScore

CLASSES = {"predictions": [1, 1, 0, 0, 1, 0], "references": [1, 0, 0, 0, 1, 1]}  # tp 2, fp 1, fn 1, tn 2


def score(name: str, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    result: dict[str, float] = TextScore(name).compute(predictions=predictions, references=references)
    return result


def test_matthews_correlation_by_hand() -> None:
    # (tp tn - fp fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn)) = (4 - 1) / 9
    assert score("cola", **CLASSES) == {"matthews_correlation": pytest.approx(1 / 3)}


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_accuracy_and_f1_by_hand(name: str) -> None:
    # f1 = 2 tp / (2 tp + fp + fn); another class 0 count makes accuracy and f1 differ.
    result = score(name, [1, 1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 1, 0, 0])
    assert result == {"accuracy": 0.75, "f1": pytest.approx(4 / 6), "combined_score": pytest.approx((0.75 + 4 / 6) / 2)}


def test_f1_is_that_of_class_one_even_where_it_is_rare() -> None:
    assert score("mrpc", [0, 0, 0, 1], [0, 0, 1, 1])["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["sst2", "mnli", "qnli", "rte", "wnli"])
def test_accuracy_by_hand(name: str) -> None:
    assert score(name, [2, 1, 0, 0], [2, 0, 0, 1]) == {"accuracy": 0.5}


def test_macro_f1_by_hand() -> None:
    # f1 of class 0: 2/3, of class 1: 1/2 (tp 1, fp 2, fn 0), of class 2: 0
    result = score("classification", [0, 0, 1, 1, 1], [0, 2, 1, 0, 2])
    assert result == {"accuracy": 0.4, "f1_macro": pytest.approx((0.5 + 0.5 + 0.0) / 3)}


def test_correlations_by_hand() -> None:
    predictions, references = [1.0, 2.0, 3.0, 5.0], [1.0, 3.0, 2.0, 4.0]
    # deviations (-1.75, -.75, .25, 2.25) and (-1.5, .5, -.5, 1.5): 5.5 / sqrt(8.75 * 5); ranks differ by 1 twice.
    pearson, spearman = 5.5 / np.sqrt(8.75 * 5.0), 1 - 6 * 2 / (4 * 15)
    result = score("stsb", predictions, references)
    assert result == {
        "pearson": pytest.approx(pearson),
        "spearmanr": pytest.approx(spearman),
        "combined_score": pytest.approx((pearson + spearman) / 2),
    }
    result = score("regression", predictions, references)
    assert result == {"mse": 0.75, "mae": 0.75, "pearson": pytest.approx(pearson), "spearmanr": pytest.approx(spearman)}


def test_what_is_undefined_is_zero_and_never_nan() -> None:
    assert score("cola", [1, 1, 1], [0, 1, 1]) == {"matthews_correlation": 0.0}
    assert score("mrpc", [0, 0], [0, 0])["f1"] == 0.0
    assert score("classification", [0, 0, 0], [0, 1, 1])["f1_macro"] == pytest.approx(0.25)
    for predictions, references in (([2.5] * 3, [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [0.0] * 3), ([1.0], [1.0])):
        assert score("stsb", predictions, references) == {"pearson": 0.0, "spearmanr": 0.0, "combined_score": 0.0}


def test_nearly_constant_predictions_raise_no_warning() -> None:
    predictions = [1.0, 1.0 + 1e-15, 1.0 - 1e-15, 1.0]
    result = score("stsb", predictions, [1.0, 2.0, 3.0, 4.0])
    assert all(np.isfinite(value) for value in result.values())


@pytest.mark.parametrize("name", [*GLUE_TASKS, "classification", "regression"])
def test_a_perfect_prediction_scores_one(name: str) -> None:
    result = score(name, [0, 1, 1, 0], [0, 1, 1, 0])
    assert {key: value for key, value in result.items() if key not in ("mse", "mae")} == pytest.approx(
        {key: 1.0 for key in result if key not in ("mse", "mae")}
    )


def test_numpy_arrays_of_training_types_are_accepted() -> None:
    metric = TextScore("sst2")
    assert metric.compute(predictions=np.array([1, 0]), references=np.array([1, 1], dtype=np.int64)) == {"accuracy": 0.5}
    numbers = np.array([1, 2, 3], dtype=np.float32)
    assert TextScore("stsb").compute(predictions=numbers, references=numbers)["pearson"] == pytest.approx(1)


def test_an_unknown_configuration_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown configuration 'snli'; choose one of cola, mrpc"):
        TextScore("snli")


def test_scoring_writes_nothing_to_the_home_folder(tmp_path: Path) -> None:
    code = "from adakron.tasks.scoring import TextScore; print(TextScore('sst2').compute(predictions=[1], references=[1]))"
    cleared = ("HF_HOME", "HF_DATASETS_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in cleared}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "{'accuracy': 1.0}", done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / ".cache" / "huggingface" / "evaluate").exists()
