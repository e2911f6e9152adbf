"""From a raw split to a checked one: the texts, and labels as class indices or numbers, every bad row reported.

GLUE marks an unlabelled test split with the label -1; own test files may do so too, leave the cells empty, or have no label
column.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adakron.tasks.sources import RawSplit

Problem = Literal["classification", "regression"]
LABEL = "label"
"""Name of the label column of a checked split (see `label_name`): int64 class indices or float64 numbers."""

LONGEST_TEXT = 1_000_000
"""Most characters of one text: a tokenizer takes a hundred bytes of memory for each, and a model reads the first few thousand."""

_INTEGER = re.compile(r"[+-]?\d+")
_MISSING = ("", "nan", "null")
_SHOWN = 80  # characters of a bad value that a message repeats


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """What a label may be.

    names: the classes, in the order of their indices; empty for regression. column: where the labels are.
    low, high: bounds of a regression label. indices: whether whole numbers in the data are class indices (GLUE), and not
    the names of classes (own data).
    """

    problem: Problem
    column: str
    names: tuple[str, ...] = ()
    indices: bool = True
    low: float = -math.inf
    high: float = math.inf
    _by_name: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {name: index for index, name in enumerate(self.names)})

    def parse(self, value: Any) -> int | float | None:
        """The class index or number that a raw label means, None where it means none that the rule allows."""
        if self.problem == "regression":
            number = as_number(value)
            return number if number is not None and self.low <= number <= self.high else None
        name = class_name(value)
        if self.indices and name is not None and _INTEGER.fullmatch(name):
            return int(name) if 0 <= int(name) < len(self.names) else None
        return None if name is None else self._by_name.get(name)

    def __str__(self) -> str:
        if self.problem == "regression":
            return "a finite number" if math.isinf(self.high) else f"a number from {self.low:g} to {self.high:g}"
        shown = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
        return f"an integer from 0 to {len(self.names) - 1}, or one of {shown}" if self.indices else f"one of the train split's: {shown}"


def as_number(value: Any) -> float | None:
    """The finite number that a raw label is or spells, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and "_" in value:
        return None  # Python reads "1_5" as 15
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def class_name(value: Any) -> str | None:
    """The class that a raw label names: 1, 1.0 and "1" are the same one, as are true and "true"; None for other values.

    None, too, for missing values ("", "nan", "null") and for whole numbers beyond the range of a float.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    if not isinstance(value, (int, str)) or is_missing(value):
        return None
    if isinstance(value, str) and not _INTEGER.fullmatch(value.strip()):
        return value.strip()
    return None if as_number(value) is None else str(value).strip()


def is_missing(value: Any) -> bool:
    """Whether a cell is null, NaN, empty, or a word for one of these."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def class_names(values: Sequence[Any]) -> tuple[str, ...]:
    """The classes among raw labels: whole numbers in numeric order, anything else in alphabetic order."""
    names = {name for value in unique(values) if (name := class_name(value)) is not None}
    if all(_INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def looks_like_regression(values: Sequence[Any]) -> bool:
    """Whether all labels are numbers and one of them is written with a decimal point or an exponent.

    Missing and infinite ones have no say: in a column of numbers they are bad rows.
    """
    kinds = [value for value in unique(values) if not is_missing(value) and not _is_infinite(value)]
    decimal = any(isinstance(value, float) or (isinstance(value, str) and not _INTEGER.fullmatch(value.strip())) for value in kinds)
    return decimal and all(as_number(value) is not None for value in kinds)


def _is_infinite(value: Any) -> bool:
    try:
        return isinstance(value, (float, str)) and math.isinf(float(value))
    except ValueError:
        return False


def unique(values: Sequence[Any]) -> list[Any]:
    """The distinct values; True, 1 and 1.0 are distinct, lists and objects are left as they are."""
    seen: dict[Any, Any] = {}
    for value in values:
        seen.setdefault((type(value), value if isinstance(value, (bool, int, float, str)) else repr(value)), value)
    return list(seen.values())


def label_name(text_columns: Sequence[str]) -> str:
    """The label column of a checked split: `label`, with underscores added while a text column is called so."""
    name = LABEL
    while name in text_columns:
        name += "_"
    return name


def check_split(split: str, raw: RawSplit, text_columns: Sequence[str], rule: LabelRule) -> tuple[datasets.Dataset | None, list[str]]:
    """The split with its text columns and, where it is labelled, `label_name`; or None and what is wrong with it.

    Only a test split may be without labels, and then wholly so. Rows are counted from 0 in the messages.
    """
    problems = []
    columns: dict[str, pa.ChunkedArray | np.ndarray] = {}
    for name in text_columns:
        texts, problem = _texts(raw, name)
        columns[name] = texts
        problems += [problem] if problem else []
    if rule.column in raw.dataset.column_names:
        labels, problem = _labels(split, raw, rule)
        problems += [problem] if problem else []
        if labels is not None:
            columns[label_name(text_columns)] = labels
    elif not split.startswith("test"):
        problems.append(missing_column(raw, rule.column, other_text_column("label")))
    if not problems and not len(raw.dataset):
        problems.append(f"{raw.source} holds no rows; it must hold at least one example")
    if problems:
        return None, problems
    return datasets.Dataset(pa.table(columns)), []


def missing_column(raw: RawSplit, column: str, remedy: str = "") -> str:
    """The message for a column that a split lacks; remedy: what to do besides renaming one, as in "or set --flag"."""
    there = ", ".join(raw.dataset.column_names)
    return f"{raw.source} has no column {column!r}; it has {there} (rename the column{', ' if remedy else ''}{remedy})"


def other_text_column(what: str) -> str:
    """The remedy of the tasks on texts; what: "text", "text_pair" or "label"."""
    return f"or use --task_name text with --{what}_column"


def _texts(raw: RawSplit, column: str) -> tuple[pa.ChunkedArray | None, str | None]:
    if column not in raw.dataset.column_names:
        return None, missing_column(raw, column, other_text_column("text"))
    texts = raw.dataset.select_columns([column]).with_format("arrow")[:].column(column)
    # A column of mixed JSON values is kept as strings of JSON.
    mixed = isinstance(raw.dataset.features[column], datasets.Json)
    if mixed or not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        for row, value in enumerate(raw.dataset[column]):
            if not isinstance(value, str):
                return None, f"{raw.source}, row {row}: {column} is {shown(value)}; it must be text"
    if texts.null_count:
        row = texts.is_null().index(pa.scalar(True)).as_py()
        return None, f"{raw.source}, row {row}: {column} is null ({texts.null_count} in all); it must be text, which may be empty"
    lengths = pc.utf8_length(texts.cast(pa.large_string()) if texts.type == pa.null() or mixed else texts)
    longest = pc.max(lengths).as_py() or 0
    if longest > LONGEST_TEXT:
        row = pc.index(lengths, longest).as_py()
        return None, (
            f"{raw.source}, row {row}: {column} has {longest:,} characters; a text may have at most {LONGEST_TEXT:,} (split it, or"
            " close the quote before it)"
        )
    return texts, None


def _labels(split: str, raw: RawSplit, rule: LabelRule) -> tuple[np.ndarray | None, str | None]:
    values = raw.dataset[rule.column][:]
    parse = _memoised(rule.parse)
    parsed = [parse(value) for value in values]
    bad = [row for row, label in enumerate(parsed) if label is None]
    if not bad:
        return np.asarray(parsed, dtype=np.float64 if rule.problem == "regression" else np.int64), None
    if split.startswith("test"):
        unlabelled = sum(_means_unlabelled(values[row]) for row in bad)
        if unlabelled == len(values):
            return None, None
    value = values[bad[0]]
    count = f" ({len(bad)} bad labels in all)" if len(bad) > 1 else ""
    allowed = f"{rule}; -1 for all rows marks an unlabelled test split" if split.startswith("test") else str(rule)
    return None, f"{raw.source}, row {bad[0]}: {rule.column} is {shown(value)}{count}; it must be {allowed}"


def _means_unlabelled(value: Any) -> bool:
    return is_missing(value) or value == -1 or (isinstance(value, str) and value.strip() in ("-1", "-1.0"))


def shown(value: Any) -> str:
    """A bad value for a message: cut where it is long, with its type where that is the trouble."""
    text = repr(value)
    if len(text) > _SHOWN:
        text = f"{text[:_SHOWN]}... ({len(text)} characters)"
    usual = value is None or isinstance(value, (bool, int, float, str))
    return text if usual else f"{text} (of type {type(value).__name__})"


def _memoised(parse: Callable[[Any], int | float | None]) -> Callable[[Any], int | float | None]:
    known: dict[tuple[type, Any], int | float | None] = {}

    def lookup(value: Any) -> int | float | None:
        if not isinstance(value, (int, float, str)):
            return parse(value)
        key = (type(value), value)
        if key not in known:
            known[key] = parse(value)
        return known[key]

    return lookup
