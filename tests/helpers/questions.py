"""Questions on a context of seven letters, a tokenizer's word each, and models that answer as told."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from adakron.config import DataConfig, TrainingConfig
from adakron.tasks import create_task
from adakron.tasks.qa import QuestionTask
from tests.helpers.tiny import write_jsonl

CONTEXT = "b c d e f g h"


def row(name: Any, *answers: str, context: str = CONTEXT, question: str = "a") -> dict[str, Any]:
    """A row of SQuAD's form; every answer where it first appears."""
    starts = [context.index(answer) for answer in answers]
    return {"id": name, "question": question, "context": context, "answers": {"text": [*answers], "answer_start": starts}}


def task_of(
    folder: Path, rows: list[dict[str, Any]], task_name: str = "squad_v2", label_smoothing: float = 0.0, **data: Any
) -> QuestionTask:
    """A task with these rows for validation, in windows of 8 tokens of which 2 are the window's before."""
    file = write_jsonl(folder / "validation.jsonl", rows)
    settings = {"max_seq_length": 8, "doc_stride": 2, "n_best_size": 3} | data
    task = create_task(
        DataConfig(task_name=task_name, validation_file=str(file), **settings), TrainingConfig(label_smoothing=label_smoothing)
    )
    assert isinstance(task, QuestionTask)
    return task


def model(logits: Tensor) -> Callable[..., Any]:
    """One that gives these logits (B, 2, T), whatever it reads."""

    def forward(**inputs: Tensor) -> Any:
        assert inputs.keys() <= {"input_ids", "attention_mask", "token_type_ids"}
        return SimpleNamespace(start_logits=logits[:, 0], end_logits=logits[:, 1])

    return forward
