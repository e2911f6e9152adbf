"""From the best spans of a question to its answer, its n-best list and how much speaks for "no answer"."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adakron.data.encoding import TokenTable
from adakron.tasks.qa.spans import WindowScores, best_spans

_NO_SPAN = -1e9
"""Stands for the score of the best span where a context has no token that a span could be made of."""


@dataclass(frozen=True)
class Answer:
    """text: the prediction, empty for no answer. span_text: that of the best span, whatever speaks for no answer.

    null_odds: null score minus the best span's score (sums of two logits); None where questions always have an answer.
    n_best: text, start_logit, end_logit and probability among the list, the best first.
    """

    text: str
    span_text: str
    null_odds: float | None
    n_best: list[dict[str, Any]]

    @property
    def probability(self) -> float:
        """Of the prediction, among its n-best list; 0 where the list does not hold it."""
        return next((float(entry["probability"]) for entry in self.n_best if entry["text"] == self.text), 0.0)


def find_answers(
    scores: WindowScores,
    table: TokenTable,
    contexts: Sequence[str],
    *,
    n_best: int,
    max_tokens: int,
    null_threshold: float | None,
) -> Iterator[Answer]:
    """The answers of all questions, in order.

    table: of `encode_windows`, all windows of one question together. null_threshold: null odds beyond which there is no answer; None
    where there always is one.
    The null score of a question is the lowest of its windows'; its n-best list then holds the empty text, too.
    """
    assert table.rows is not None
    spans = best_spans(scores, table.rows, n_best, max_tokens)
    tokens = table.offsets[spans.windows]
    begins, ends = table.features["char_starts"][tokens + spans.firsts], table.features["char_ends"][tokens + spans.lasts]
    bounds = np.searchsorted(spans.questions, np.arange(len(contexts) + 1))
    null = _null_logits(scores, table.rows, len(contexts))
    for question, context in enumerate(contexts):
        own = slice(bounds[question], bounds[question + 1])
        texts = [context[begin:end] for begin, end in zip(begins[own], ends[own], strict=True)]
        start_logits, end_logits = spans.start_logits[own].tolist(), spans.end_logits[own].tolist()
        entries = list(zip(texts, start_logits, end_logits, strict=True))
        yield _answer(entries, null[question].tolist(), n_best, null_threshold)


def _null_logits(scores: WindowScores, rows: np.ndarray, questions: int) -> np.ndarray:
    """(questions, 2): start and end logit of the null token in the window where their sum is lowest."""
    sums = scores.null.astype(np.float64).sum(1)
    order = np.lexsort((sums, rows))
    lowest = order[np.searchsorted(rows[order], np.arange(questions))]
    return scores.null[lowest].astype(np.float64)


def _answer(entries: list[tuple[str, float, float]], null: tuple[float, float], n_best: int, null_threshold: float | None) -> Answer:
    span_text = next((text for text, _, _ in entries if text), "")
    if null_threshold is None:
        return Answer(span_text, span_text, None, _with_probabilities(entries))
    best = next((start + end for text, start, end in entries if text), _NO_SPAN)
    odds = sum(null) - best
    # The empty text stays in the list, in the place of its score or at the end.
    behind = sum(start + end >= sum(null) for _, start, end in entries)
    listed = entries[: n_best - 1]
    listed.insert(min(behind, len(listed)), ("", null[0], null[1]))
    return Answer("" if odds > null_threshold else span_text, span_text, odds, _with_probabilities(listed))


def _with_probabilities(entries: Sequence[tuple[str, float, float]]) -> list[dict[str, Any]]:
    sums = np.array([start + end for _, start, end in entries])
    weights = np.exp(sums - sums.max()) if len(sums) else sums
    shares = (weights / weights.sum()).tolist() if len(sums) else []
    return [
        {"text": text, "start_logit": start, "end_logit": end, "probability": share}
        for (text, start, end), share in zip(entries, shares, strict=True)
    ]
