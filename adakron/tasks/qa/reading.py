"""Questions from files: rows with SQuAD's columns, or SQuAD's own nested JSON; every bad row is found before training."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from adakron.errors import DataError
from adakron.tasks.labels import LONGEST_TEXT, missing_column, shown
from adakron.tasks.sources import RawSplit
from adakron.untrusted import UnreadableError, read_json

ID, QUESTION, CONTEXT, ANSWERS, STARTS = "id", "question", "context", "answers", "answer_starts"
"""Columns of a checked split: texts; ANSWERS a list of texts and STARTS where each begins in the context, both absent unlabelled."""

_NESTED_BYTES = 256 * 2**20
"""Most bytes of a nested file; SQuAD's largest has 42 million."""


def read_nested(path: Path) -> datasets.Dataset | None:
    """The questions of a file {"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}; None if it is none."""
    with path.open(encoding="utf-8-sig") as file:
        if not file.read(1000).lstrip().startswith("{"):
            return None
    try:
        content = read_json(path, _NESTED_BYTES)
    except (OSError, UnreadableError):
        return None  # one object per line, or damaged: the reader of rows says where
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return None
    try:
        rows = [
            {ID: question["id"], QUESTION: question["question"], CONTEXT: paragraph["context"], ANSWERS: question.get("answers")}
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
        labelled = [row for row in rows if row[ANSWERS] is not None]
        if labelled and len(labelled) < len(rows):
            raise DataError(f"{path}: {len(rows) - len(labelled)} of {len(rows)} questions have no answers; all must have them, or none")
        for row in rows:
            row[ANSWERS] = [{"text": answer["text"], "answer_start": answer["answer_start"]} for answer in row[ANSWERS] or ()]
        made = datasets.Dataset.from_list(rows)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} has data, but not as SQuAD nests it: {reason}; compare docs/qa.md") from None
    except Exception as error:  # pyarrow's errors, on mixed kinds, have no common base
        raise DataError(f"{path} cannot be read as SQuAD's nested JSON: {error}; compare docs/qa.md") from error
    if not rows:
        raise DataError(f"{path} holds no questions; it must hold at least one")
    return made if labelled else made.remove_columns(ANSWERS)


def check_questions(split: str, raw: RawSplit, *, unanswerable: bool) -> datasets.Dataset:
    """The checked split. unanswerable: whether questions may have no answer. Raises DataError with the first bad row."""
    for column in (ID, QUESTION, CONTEXT):
        if column not in raw.dataset.column_names:
            raise DataError(missing_column(raw, column))
    labelled = ANSWERS in raw.dataset.column_names
    if not labelled and split != "test":
        raise DataError(missing_column(raw, ANSWERS))
    made: dict[str, list[Any]] = {name: [] for name in (ID, QUESTION, CONTEXT, *((ANSWERS, STARTS) if labelled else ()))}
    seen: set[str] = set()
    for number, row in enumerate(_rows(raw.dataset, labelled)):
        try:
            checked = _checked(row, labelled, unanswerable)
            if checked[ID] in seen:
                raise ValueError(f"id {shown(checked[ID])} is an earlier row's, too; every question needs its own")
        except ValueError as error:
            raise DataError(f"{raw.source}, row {number}: {error}") from None
        seen.add(checked[ID])
        for name, value in checked.items():
            made[name].append(value)
    if not seen:
        raise DataError(f"{raw.source} has no rows; it must hold at least one question")
    kinds = {ANSWERS: datasets.List(datasets.Value("string")), STARTS: datasets.List(datasets.Value("int64"))}
    features = datasets.Features({name: kinds.get(name, datasets.Value("string")) for name in made})
    return datasets.Dataset.from_dict(made, features=features)


def _rows(dataset: datasets.Dataset, labelled: bool) -> Iterator[dict[str, Any]]:
    columns = [ID, QUESTION, CONTEXT, *([ANSWERS] if labelled else [])]
    for batch in dataset.select_columns(columns).iter(10_000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def _checked(row: Mapping[str, Any], labelled: bool, unanswerable: bool) -> dict[str, Any]:
    name = str(row[ID]) if isinstance(row[ID], int) else row[ID]
    if not isinstance(name, str) or not name:
        raise ValueError(f"id is {shown(row[ID])}; it must be a text or a whole number")
    for column in (QUESTION, CONTEXT):
        text = row[column]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{column} is {shown(text)}; it must be a text")
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"{column} has {len(text):,} characters; at most {LONGEST_TEXT:,} are read")
    checked = {ID: name, QUESTION: row[QUESTION], CONTEXT: row[CONTEXT]}
    if not labelled:
        return checked
    texts, starts = _answers(row[ANSWERS])
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"an answer's text is {shown(text)}; it must be a text (a question without an answer has an empty list)")
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise ValueError(f"an answer_start is {shown(start)}; it must be a character of the context, counted from 0")
        there = row[CONTEXT][start : start + len(text)]
        if there != text:
            raise ValueError(f"answer_start {start} gives {shown(there)} and not the answer {shown(text)}; correct it (characters from 0)")
    if not texts and not unanswerable:
        raise ValueError("it has no answer; give one, or choose --task_name squad_v2 or qa with --version_2_with_negative")
    return {**checked, ANSWERS: texts, STARTS: starts}


def _answers(value: Any) -> tuple[list[Any], list[Any]]:
    """Texts and starts from {"text": [...], "answer_start": [...]} or from a list of {"text", "answer_start"}."""
    if isinstance(value, list) and all(isinstance(answer, dict) and {"text", "answer_start"} <= answer.keys() for answer in value):
        return [answer["text"] for answer in value], [answer["answer_start"] for answer in value]
    if isinstance(value, dict) and {"text", "answer_start"} <= value.keys():
        texts, starts = value["text"], value["answer_start"]
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            return texts, starts
    raise ValueError(f'answers is {shown(value)}; it must be {{"text": [...], "answer_start": [...]}}, lists of one length')
