"""Exact match and F1 of extracted answers, as SQuAD defines them.

Rajpurkar et al. 2016 (https://aclanthology.org/D16-1264, section 6) for version 1.1; Rajpurkar, Jia and Liang 2018
(https://aclanthology.org/P18-2124) for version 2.0, where a question may have no answer. All values but counts and thresholds are
percentages, as the official scripts print them. No part of those scripts is copied; the tests name the cases that decide.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

References = Mapping[str, Sequence[str]]
"""The acceptable answers of each question, by its id; none for a question without an answer."""


def normalized(answer: str) -> str:
    """Lower case, without ASCII punctuation, without the words a, an and the, words one space apart; in this order."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_WITHOUT_PUNCTUATION)).split())


def squad_v1(predictions: Mapping[str, str], references: References) -> dict[str, float]:
    """exact_match and f1: of each question the best over its answers, then the mean. A question without a prediction counts 0."""
    exact = f1 = 0.0
    for name, answers in references.items():
        if name in predictions:
            prediction = normalized(predictions[name])
            wanted = [normalized(answer) for answer in answers]
            exact += max(float(prediction == answer) for answer in wanted)
            f1 += max(_overlap(prediction.split(), answer.split()) for answer in wanted)
    return {"exact_match": 100.0 * exact / len(references), "f1": 100.0 * f1 / len(references)}


def squad_v2(
    predictions: Mapping[str, str],
    references: References,
    null_odds: Mapping[str, float] | None = None,
    answers: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """The scores of version 2.0. An empty prediction says that there is no answer.

    exact and f1 over all questions with a prediction (total); HasAns_... and NoAns_... over those with and without an answer, where
    there are any. With null_odds, a number per question that is high where there is probably no answer: best_exact and best_f1, the
    best that a threshold could reach beyond which predictions are emptied, and that threshold; `answers` are what is predicted
    below it, by default the predictions.
    """
    exact, f1 = _v2_raw(predictions, references)
    groups = {
        "HasAns_": [name for name in exact if references[name]],
        "NoAns_": [name for name in exact if not references[name]],
    }
    scores = _means("", exact, f1, list(exact))
    for prefix, names in groups.items():
        scores |= _means(prefix, exact, f1, names) if names else {}
    if null_odds is not None:
        given = predictions if answers is None else answers
        for kind, raw in zip(("exact", "f1"), _v2_raw(given, references), strict=True):
            scores[f"best_{kind}"], scores[f"best_{kind}_thresh"] = _best_threshold(given, raw, null_odds, references)
    return scores


def _means(prefix: str, exact: Mapping[str, float], f1: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    means = (100.0 * sum(values[name] for name in names) / len(names) for values in (exact, f1))
    return {**dict(zip((f"{prefix}exact", f"{prefix}f1"), means, strict=True)), f"{prefix}total": len(names)}


def _v2_raw(predictions: Mapping[str, str], references: References) -> tuple[dict[str, float], dict[str, float]]:
    exact, f1 = {}, {}
    for name, answers in references.items():
        if name in predictions:
            prediction = normalized(predictions[name])
            # An answer that is nothing but articles and punctuation does not count.
            wanted = [answer for answer in map(normalized, answers) if answer] or [""]
            exact[name] = max(float(prediction == answer) for answer in wanted)
            f1[name] = max(_overlap_or_both_empty(prediction.split(), answer.split()) for answer in wanted)
    return exact, f1


def _overlap(predicted: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of the two bags of words, 0 where they share none."""
    common = sum((Counter(predicted) & Counter(answer)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(answer)
    return 2.0 * precision * recall / (precision + recall)


def _overlap_or_both_empty(predicted: Sequence[str], answer: Sequence[str]) -> float:
    return _overlap(predicted, answer) if predicted and answer else float(not predicted and not answer)


def _best_threshold(
    predictions: Mapping[str, str], raw: Mapping[str, float], null_odds: Mapping[str, float], references: References
) -> tuple[float, float]:
    """(best mean in percent, the threshold). Predictions are let in one by one, the least null first; at the start all are empty.

    0 where nothing beats that, whatever the odds are. A tie of odds is taken one by one, too, as in the official script.
    """
    score = best = float(sum(not answers for answers in references.values()))
    threshold = 0.0
    for name in sorted(null_odds, key=lambda name: null_odds[name]):
        if name not in raw:
            continue
        if references[name]:
            score += raw[name]
        elif predictions[name]:
            score -= 1.0
        if score > best:
            best, threshold = score, float(null_odds[name])
    return 100.0 * best / len(raw), threshold
