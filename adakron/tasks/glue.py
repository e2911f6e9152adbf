"""GLUE (Wang et al. 2019, https://gluebenchmark.com) with its columns, label order and metrics; and own data in its manner."""

from collections.abc import Mapping
from typing import Any

import datasets

from adakron.config import DATA_FILES, DataConfig, TrainingConfig
from adakron.errors import DataError
from adakron.tasks.classification import SPLITS, TextClassificationTask, TextSpec
from adakron.tasks.labels import (
    LabelRule,
    as_number,
    class_name,
    class_names,
    is_missing,
    looks_like_regression,
    missing_column,
    other_text_column,
    shown,
)
from adakron.tasks.sources import RawSplit, load_raw_splits

_ONE_OR_TWO_WAY = ("train", "validation", "test")


def _glue(
    scoring: str, columns: tuple[str, ...], names: tuple[str, ...], metrics: tuple[str, ...] = ("accuracy",), best: str | None = None
) -> TextSpec:
    label = LabelRule(problem="classification" if names else "regression", column="label", names=names, low=0.0, high=5.0)
    return TextSpec(text_columns=columns, label=label, scoring=scoring, metric_names=metrics, metric_for_best=best or metrics[0])


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_ACCURACY_F1 = ("accuracy", "f1", "combined_score")

# Label order is the index in the data. WNLI's is the other way round than RTE's. MRPC and QQP select by accuracy, as the
# published runs did, though GLUE's table averages accuracy and F1.
GLUE_TASKS: Mapping[str, TextSpec] = {
    "cola": _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": _glue("sst2", ("sentence",), ("negative", "positive")),
    "mrpc": _glue("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), _ACCURACY_F1),
    "stsb": _glue("stsb", _SENTENCES, (), ("pearson", "spearmanr", "combined_score")),
    "qqp": _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _ACCURACY_F1),
    "mnli": _glue("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": _glue("qnli", ("question", "sentence"), _ENTAILMENT),
    "rte": _glue("rte", _SENTENCES, _ENTAILMENT),
    "wnli": _glue("wnli", _SENTENCES, ("not_entailment", "entailment")),
}


class GlueTask(TextClassificationTask):
    """One of the nine GLUE tasks, from files or from the hub. Only MNLI has "validation_mismatched" and "test_mismatched"."""

    def _load(self) -> dict[str, RawSplit]:
        splits = SPLITS if self.name == "mnli" else _ONE_OR_TWO_WAY
        return load_raw_splits(self._data, splits, hub_task=self.name)

    def _describe(self, raw: Mapping[str, RawSplit]) -> TextSpec:
        return GLUE_TASKS[self.name]

    @property
    def spec(self) -> TextSpec:
        """The task's row of the table; needs no data."""
        return GLUE_TASKS[self.name]


class TextTask(TextClassificationTask):
    """Own data: one or two text columns and a label column of class names, whole numbers or decimal numbers.

    The classes are those of the train split: whole numbers in numeric order, other names in alphabetic order. saved_options:
    the model options that an earlier run had; they decide instead of the train split, which then need not exist.
    """

    def __init__(self, data: DataConfig, training: TrainingConfig, saved_options: Mapping[str, Any] | None = None):
        super().__init__(data, training)
        self._saved_options = saved_options

    def _load(self) -> dict[str, RawSplit]:
        return load_raw_splits(self._data, _ONE_OR_TWO_WAY)

    @property
    def spec(self) -> TextSpec:
        """Known without data where an earlier run recorded it: single texts can then be predicted anywhere."""
        if self._saved_options is not None:
            # Without files the texts come from the command line, and no column is looked at.
            column = self._data.text_column or (None if any(getattr(self._data, name) for name in DATA_FILES) else "text")
            if column:
                return self._spec(self._saved_rule(), column)
        return super().spec

    def _describe(self, raw: Mapping[str, RawSplit]) -> TextSpec:
        label = self._saved_rule() if self._saved_options is not None else self._rule_from_train(raw)
        return self._spec(label, self._text_column(raw))

    def _spec(self, label: LabelRule, text_column: str) -> TextSpec:
        columns = tuple(filter(None, (text_column, self._data.text_pair_column)))
        if label.problem == "regression":
            metrics: tuple[str, ...] = ("mse", "mae", "pearson", "spearmanr")
            return TextSpec(text_columns=columns, label=label, scoring="regression", metric_names=metrics, metric_for_best="pearson")
        metrics = ("accuracy", "f1_macro")
        return TextSpec(text_columns=columns, label=label, scoring="classification", metric_names=metrics, metric_for_best="accuracy")

    @property
    def _label_column(self) -> str:
        return self._data.label_column or "label"

    def _saved_rule(self) -> LabelRule:
        assert self._saved_options is not None
        if self._saved_options.get("problem_type") == "regression":
            return LabelRule(problem="regression", column=self._label_column)
        # JSON turned the indices into strings.
        names = {int(index): name for index, name in self._saved_options["id2label"].items()}
        ordered = tuple(names[index] for index in range(len(names)))
        return LabelRule(problem="classification", column=self._label_column, names=ordered, indices=False)

    def _rule_from_train(self, raw: Mapping[str, RawSplit]) -> LabelRule:
        problem = self._data.problem
        if problem == "regression":
            return LabelRule(problem="regression", column=self._label_column)
        if "train" not in raw:
            raise DataError(
                "task text takes its classes from the train split, and there is none; give --train_file, or a --data_dir with train.*"
            )
        train = raw["train"]
        if self._label_column not in train.dataset.column_names:
            raise DataError(missing_column(train, self._label_column, other_text_column("label")))
        values = train.dataset[self._label_column][:]
        if problem is None and looks_like_regression(values):
            return LabelRule(problem="regression", column=self._label_column)
        names = class_names(values)
        if len(names) < 2:
            bad = next((row for row, value in enumerate(values) if class_name(value) is None), None)
            number = bool(values) and as_number(values[bad or 0]) is not None
            hint = "; for decimal numbers set --problem regression" if number else ""
            if bad is not None:
                raise DataError(
                    f"{train.source}, row {bad}: {self._label_column} is {shown(values[bad])}; it must be a class: a word, a whole number, "
                    f"true or false{hint} (set --label_column)"
                )
            raise DataError(
                f"{train.source}: column {self._label_column!r} holds {len(names)} class{'' if len(names) == 1 else 'es'} "
                f"({', '.join(names) or 'none'}); classification needs two or more{hint} (set --label_column)"
            )
        return LabelRule(problem="classification", column=self._label_column, names=names, indices=False)

    def _text_column(self, raw: Mapping[str, RawSplit]) -> str:
        if self._data.text_column:
            return self._data.text_column
        first = next(iter(raw.values()))
        taken = (self._label_column, self._data.text_pair_column)
        for name in first.dataset.column_names:
            if name not in taken and _may_hold_text(first.dataset.features[name]):
                # Cells of csv and tsv files are strings, too, where they hold numbers.
                values = first.dataset[name][:1000]
                if any(isinstance(value, str) and not is_missing(value) and as_number(value) is None for value in values):
                    return name
        columns = ", ".join(first.dataset.column_names)
        raise DataError(f"{first.source} has no text column besides {', '.join(filter(None, taken))}; it has {columns} (set --text_column)")


def _may_hold_text(feature: Any) -> bool:
    """Whether a column has strings; a JSON column of mixed types may, and is then refused with its first bad row."""
    return isinstance(feature, datasets.Json) or (isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"))
