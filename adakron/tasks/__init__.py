"""The problems that can be trained: one label per text, causal language models, questions on a context."""

import difflib
from collections.abc import Mapping
from typing import Any

from adakron.config import DataConfig, TrainingConfig
from adakron.errors import ConfigError
from adakron.tasks.base import Task
from adakron.tasks.causal import CAUSAL_TASKS, PAIR_TASKS, PlainTextTask
from adakron.tasks.glue import GLUE_TASKS, GlueTask, TextTask
from adakron.tasks.ner import NerTask
from adakron.tasks.qa import QA_TASKS, QuestionTask
from adakron.tasks.quickstart import QuickstartTask

TASK_NAMES = ("quickstart", *GLUE_TASKS, "text", *CAUSAL_TASKS, "ner", *QA_TASKS)

_USED_BY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("text_column", "text_pair_column", "label_column", "problem"), ("text",)),
    **dict.fromkeys(("source_column", "target_column"), ("pairs",)),
    "pack": CAUSAL_TASKS,
    "stride": ("lm",),
    **dict.fromkeys(("doc_stride", "n_best_size", "max_answer_length"), QA_TASKS),
    "version_2_with_negative": ("qa",),
    "null_score_diff_threshold": ("squad_v2", "qa"),
}
"""Settings that not every task uses, and the tasks that do."""


def create_task(data: DataConfig, training: TrainingConfig, model_options: Mapping[str, Any] | None = None) -> Task:
    """The task that the settings name; it reads its data when first asked for it.

    model_options: those that a saved run was trained with; its classes are kept then, whatever the data holds.
    Raises ConfigError for an unknown task, for settings that the task would ignore, and for a column that has two uses.
    """
    name = data.task_name
    if name not in TASK_NAMES:
        close = difflib.get_close_matches(name.lower().replace("-", ""), TASK_NAMES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"task_name is {name!r}; it must be one of {', '.join(TASK_NAMES)}{hint} (set --task_name)")
    problems = _ignored_settings(data) or _columns_used_twice(data)
    if problems:
        raise ConfigError(problems)
    if name == "text":
        return TextTask(data, training, saved_options=model_options)
    if name == "ner":
        return NerTask(data, training, saved_options=model_options)
    if name == "lm":
        return PlainTextTask(data, training)
    if name in QA_TASKS:
        return QuestionTask(data, training)
    if name in PAIR_TASKS:
        return PAIR_TASKS[name](data, training)
    return QuickstartTask(data, training) if name == "quickstart" else GlueTask(data, training)


def _ignored_settings(data: DataConfig) -> list[str]:
    rules: dict[str, tuple[str, tuple[str, ...]]] = {
        field: (_reason(field), users) for field, users in _USED_BY.items() if data.task_name not in users
    }
    if data.task_name == "quickstart":
        rules |= dict.fromkeys(("data_dir", "train_file", "validation_file"), ("writes its own reviews", ("text",)))
    if data.task_name == "lm":
        rules |= dict.fromkeys(("max_eval_samples", "max_predict_samples"), ("scores whole texts, word by word", tuple(PAIR_TASKS)))
    return [
        f"{field} is {getattr(data, field)}, but task {data.task_name} {reason}; drop --{field}, or set --task_name {' or '.join(users)}"
        for field, (reason, users) in rules.items()
        if getattr(data, field) not in (None, False)
    ]


_REASONS = {
    "pack": "keeps every example in a row of its own",
    "stride": "cuts no text into windows by it",
    "version_2_with_negative": "knows by itself whether a question may have no answer",
    "null_score_diff_threshold": "has no questions without an answer",
    **dict.fromkeys(("doc_stride", "n_best_size", "max_answer_length"), "has no questions on a context"),
}


def _reason(field: str) -> str:
    return _REASONS.get(field, "has its own columns and labels")


def _columns_used_twice(data: DataConfig) -> list[str]:
    columns = {
        "text": (
            ("text_column", data.text_column), ("text_pair_column", data.text_pair_column), ("label_column", data.label_column or "label")
        ),
        "pairs": (("source_column", data.source_column or "source"), ("target_column", data.target_column or "target")),
    }  # fmt: skip
    uses: dict[str, list[str]] = {}
    for field, column in columns.get(data.task_name, ()):
        if column:
            uses.setdefault(column, []).append(field)
    return [
        f"{' and '.join(fields)} name the same column {column!r}; a column has one use (set --{' or --'.join(fields)})"
        for column, fields in uses.items()
        if len(fields) > 1
    ]
