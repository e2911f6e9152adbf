"""The metrics of the classification and regression tasks, as an `evaluate` module that ships with the package.

The values are those of scikit-learn and scipy, which GLUE's own metric uses too
(https://gluebenchmark.com, Wang et al. 2019, table 1; the published runs used the metrics of the same names).
"""

import warnings
from collections.abc import Callable, Sequence

import datasets
import evaluate
import numpy as np
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from adakron.scores.metric import LocalMetric

Score = dict[str, float]


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> Score:
    return {"accuracy": float(accuracy_score(references, predictions))}


def _matthews(predictions: np.ndarray, references: np.ndarray) -> Score:
    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def _accuracy_and_f1(predictions: np.ndarray, references: np.ndarray) -> Score:
    score = _accuracy(predictions, references)
    score["f1"] = float(f1_score(references, predictions, pos_label=1, zero_division=0.0))
    return _with_mean(score)


def _classification(predictions: np.ndarray, references: np.ndarray) -> Score:
    score = _accuracy(predictions, references)
    score["f1_macro"] = float(f1_score(references, predictions, average="macro", zero_division=0.0))
    return score


def _correlations(predictions: np.ndarray, references: np.ndarray) -> Score:
    if len(references) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return {"pearson": 0.0, "spearmanr": 0.0}
    with warnings.catch_warnings():
        # Near-constant predictions, as of an untrained head, still have a defined correlation.
        warnings.simplefilter("ignore", NearConstantInputWarning)
        warnings.simplefilter("ignore", ConstantInputWarning)
        pair = {"pearson": pearsonr(predictions, references)[0], "spearmanr": spearmanr(predictions, references)[0]}
    return {name: float(np.nan_to_num(value)) for name, value in pair.items()}


def _stsb(predictions: np.ndarray, references: np.ndarray) -> Score:
    return _with_mean(_correlations(predictions, references))


def _regression(predictions: np.ndarray, references: np.ndarray) -> Score:
    errors = predictions - references
    return {"mse": float(np.mean(errors**2)), "mae": float(np.mean(np.abs(errors))), **_correlations(predictions, references)}


def _with_mean(score: Score) -> Score:
    return {**score, "combined_score": float(np.mean(list(score.values())))}


_FUNCTIONS: dict[str, Callable[[np.ndarray, np.ndarray], Score]] = {
    "cola": _matthews,
    "mrpc": _accuracy_and_f1,
    "qqp": _accuracy_and_f1,
    "stsb": _stsb,
    "sst2": _accuracy,
    "mnli": _accuracy,
    "qnli": _accuracy,
    "rte": _accuracy,
    "wnli": _accuracy,
    "classification": _classification,
    "regression": _regression,
}
REGRESSION = ("stsb", "regression")
"""The configurations whose predictions are numbers; those of the others are class indices."""


class TextScore(LocalMetric):
    """Scores predictions against references; `config_name` is one of the GLUE tasks, "classification" or "regression".

    Returned by `compute(predictions=..., references=...)`, all as fractions of 1:
    cola: matthews_correlation. mrpc, qqp: accuracy, f1 (of class 1) and their mean combined_score. stsb: pearson,
    spearmanr and their mean combined_score. The other GLUE tasks: accuracy. classification: accuracy, f1_macro (mean over
    the classes that occur). regression: mse, mae (in units of the labels and their square), pearson, spearmanr.
    A correlation or F1 that is undefined, because predictions or references are constant or a class is never predicted,
    is 0.0.
    """

    def __init__(self, config_name: str):
        if config_name not in _FUNCTIONS:
            raise ValueError(f"unknown configuration {config_name!r}; choose one of {', '.join(_FUNCTIONS)}")
        super().__init__(config_name)

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if self.config_name in REGRESSION else "int64")
        return evaluate.MetricInfo(
            description="Metrics of the AdaKron classification and regression tasks.",
            citation="",
            inputs_description=TextScore.__doc__ or "",
            features=datasets.Features({"predictions": kind, "references": kind}),
            format="numpy",
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> Score:
        return _FUNCTIONS[self.config_name](np.asarray(predictions), np.asarray(references))
