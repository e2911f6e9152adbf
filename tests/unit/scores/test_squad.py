"""Exact match and F1 on cases whose values follow from the definition by hand."""

import pytest

from adakron.scores.squad import normalized, squad_v1, squad_v2


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Denver\tBroncos!", "denver broncos"),
        ("a cat, an owl and the dog", "cat owl and dog"),
        ("Theatre of another ant", "theatre of another ant"),
        ("U.S.A.", "usa"),
        ("e-mail", "email"),
        ("a.", ""),
        ("24\u201310", "24\u201310"),  # the dash is no ASCII punctuation
        ("Zürich\u00a0(ZH)", "zürich zh"),
        ("the-cat", "thecat"),  # punctuation goes first, and leaves no article behind
        ("", ""),
    ],
)
def test_what_is_compared(answer: str, expected: str) -> None:
    assert normalized(answer) == expected


def test_the_best_of_several_answers_counts_in_each_score_by_itself() -> None:
    scores = squad_v1({"q": "Denver Broncos team"}, {"q": ["Broncos", "the Denver Broncos", "team"]})
    # Two of three words right, both of the answer's found: 2 (2/3) 1 / (2/3 + 1).
    assert scores == pytest.approx({"exact_match": 0.0, "f1": 80.0})


def test_repeated_words_count_as_often_as_both_have_them() -> None:
    scores = squad_v1({"q": "no no no"}, {"q": ["no no yes"]})
    assert scores == pytest.approx({"exact_match": 0.0, "f1": 100 * 2 / 3})


def test_version_1_counts_a_missing_prediction_as_wrong_and_an_empty_one_by_its_words() -> None:
    scores = squad_v1({"empty": "", "articles": "a"}, {"empty": ["Paris"], "articles": ["The"], "missing": ["x"], "also": ["y"]})
    # Both normalise to nothing, which is equal, but has no word in common.
    assert scores == {"exact_match": 25.0, "f1": 0.0}


def test_version_2_with_and_without_answers() -> None:
    predictions = {"right": "the cat", "half": "big cat", "null": "", "not null": "dog", "lost": ""}
    references = {"right": ["cat"], "half": ["cat"], "null": [], "not null": [], "lost": ["fish"], "no prediction": ["x"]}
    assert squad_v2(predictions, references) == pytest.approx(
        {
            "exact": 40.0, "f1": 100 * (1 + 2 / 3 + 1) / 5, "total": 5,
            "HasAns_exact": 100 / 3, "HasAns_f1": 100 * (1 + 2 / 3) / 3, "HasAns_total": 3,
            "NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2,
        }
    )  # fmt: skip


def test_version_2_leaves_out_groups_without_questions_and_answers_without_words() -> None:
    scores = squad_v2({"q": ""}, {"q": ["the", "cat"]})
    assert scores == {"exact": 0.0, "f1": 0.0, "total": 1, "HasAns_exact": 0.0, "HasAns_f1": 0.0, "HasAns_total": 1}
    assert squad_v2({"q": ""}, {"q": ["the"]})["exact"] == 100.0, "an answer of articles alone is none"


def test_the_best_threshold_lets_in_what_pays() -> None:
    predictions = {"a": "cat", "b": "dog", "c": "red fish", "d": "owl"}
    references: dict[str, list[str]] = {"a": ["cat"], "b": [], "c": ["fish"], "d": ["eel"]}
    odds = {"a": -2.0, "b": 1.0, "c": 0.5, "d": -1.0}
    scores = squad_v2(predictions, references, odds)
    # All empty: b is right. Then in order a (+1), d (+0), c (+0 exact, +2/3 F1), b (-1).
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (50.0, -2.0)
    assert (scores["best_f1"], scores["best_f1_thresh"]) == (pytest.approx(100 * (2 + 2 / 3) / 4), 0.5)
    emptied = {name: text if odds[name] <= 0.5 else "" for name, text in predictions.items()}
    assert squad_v2(emptied, references)["f1"] == pytest.approx(scores["best_f1"])
    assert squad_v2(dict.fromkeys(odds, ""), references, odds, predictions)["best_f1"] == scores["best_f1"]


def test_where_no_answer_pays_the_threshold_is_0() -> None:
    scores = squad_v2({"a": "x", "b": "y"}, {"a": [], "b": ["z"]}, {"a": -5.0, "b": -7.0})
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (50.0, 0.0)
