"""Every score on cases that can be worked out by hand, and what all have in common."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from adakron.errors import ConfigError, DataError
from adakron.scores import GenerationScore, generation, score_texts
from adakron.scores.cider import cider
from adakron.scores.nist import nist
from adakron.scores.profiles import PROFILES
from adakron.scores.ter import corpus_ter, edits_between, mean_ter
from adakron.scores.words import split_punctuation, word_rule

NAMES = ["bleu", "nist", "meteor_exact_stem", "rouge_l", "cider", "ter", "chrf++"]


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NLTK_DATA", raising=False)


def score(name: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]], profile: str = "plain") -> float:
    return score_texts(hypotheses, references, profile=profile)[name]


def test_bleu_by_hand() -> None:
    # Matches: 5 of 6 words, 3 of 5 pairs (the cat, on the, the mat), 1 of 4 triples (on the mat), 0 of 3: 0 without smoothing.
    hypothesis, reference = "the cat is on the mat", "the cat sat on the mat"
    assert score("bleu", [hypothesis], [[reference]], "e2e") == 0.0
    # With exponential smoothing the last precision is 1 / (2 * 3).
    expected = (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert score("bleu", [hypothesis], [[reference]]) == pytest.approx(100 * expected)


def test_bleu_counts_matches_in_any_reference_and_compares_with_the_closest_length() -> None:
    # 4 of 4 words, 3 of 3 pairs, 2 of 2 triples, 1 of 1; the lengths 5 and 2 are 1 and 2 away: brevity exp(1 - 5 / 4).
    assert score("bleu", ["a b c d"], [["a b c d e", "c d"]], "dart") == pytest.approx(100 * math.exp(-0.25))


def test_nist_by_hand() -> None:
    # 4 reference words: a twice, b, c. log2: info(a) = 4/2 = 1, info(b) = 4/1 = 2; info(a b) = count(a) / count(a b) = 2/1 = 1.
    # Words (1 + 2) / 2, pairs 1 / 1, no triples. The output has 2 words of 4: exp(ln(.5) / ln(1.5)^2 * ln(.5)^2).
    factor = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(0.5) ** 2)
    assert nist([["a", "b"]], [[["a", "b", "a", "c"]]]) == pytest.approx((1.5 + 1.0) * factor)
    # At two thirds of the average reference length (2 and 4) the factor is one half: a alone, info log2(6/3) = 1, b absent.
    assert nist([["a", "x"]], [[["a", "a"], ["a", "c", "d", "e"]]]) == pytest.approx(0.5 * 1 * math.exp(math.log(0.5)), rel=1e-9)


def test_nist_counts_a_word_as_often_as_one_reference_has_it() -> None:
    # Two references "a b" and "a c": 4 words, info(a) = log2(4/2) = 1. Of two a's one counts: 1 / 2; the pair "a a" is in neither.
    assert nist([["a", "a"]], [[["a", "b"], ["a", "c"]]]) == pytest.approx(0.5)


def test_meteor_by_hand() -> None:
    # 6 of 6 words match, jumps with jumped by its stem; P = R = 1, one chunk: penalty .5 * (1/6)^3.
    hypothesis, reference = "the fox jumps over the dog", "the fox jumped over the dog"
    assert score("meteor_exact_stem", [hypothesis], [[reference]]) == pytest.approx(100 * (1 - 0.5 / 6**3))
    # 2 of 4 words match: P = 2/4, R = 2/2, F = PR / (.9 P + .1 R) = .5 / .55; "a b" is one chunk of 2: penalty .5 * (1/2)^3.
    assert score("meteor_exact_stem", ["a b x y"], [["a b"]]) == pytest.approx(100 * 0.5 / 0.55 * (1 - 0.5 / 8))


def test_rouge_l_by_hand() -> None:
    # LCS with "a b c d e": a c e, P = 3/3, R = 3/5; with "a x": a, P = 1/3, R = 1/2. Best F1 = 2 * .6 / 1.6.
    references = [["a b c d e", "a x"]]
    assert score("rouge_l", ["a c e"], references) == pytest.approx(100 * 0.75)
    # e2e: best precision 1 and best recall .6, beta^2 = 1.44: 2.44 * .6 / (.6 + 1.44).
    assert score("rouge_l", ["a c e"], references, "e2e") == pytest.approx(100 * 2.44 * 0.6 / 2.04)


def test_e2e_rouge_takes_precision_and_recall_from_different_references() -> None:
    # Precision 1 from "a b c d" (2 of 2), recall 1 from "a" (1 of 1): 1, where no single reference has an F of 1.
    assert score("rouge_l", ["a b"], [["a b c d", "a"]], "e2e") == pytest.approx(100.0)


def test_cider_by_hand() -> None:
    # Two texts; every n-gram is in the references of one of them: idf = ln 2 throughout, so it cancels in the cosines.
    # First: words a b | a c: the product 1, norms sqrt 2 each: 1/2. Pairs: none in common. Lengths are equal: 10 * (1/2) / 4.
    # Second: the same 4 words: cosine 1 at each of 4 orders: 10.
    references = [[["a", "c"]], [["p", "q", "r", "s"]]]
    assert cider([["a", "b"], ["p", "q", "r", "s"]], references) == pytest.approx((10 * 0.5 / 4 + 10) / 2, rel=1e-9)
    # One word too many costs exp(-1 / 72), and clipping: "a a" against "a" counts 1 * 1 / (2 * 1).
    assert cider([["a", "a"], []], [[["a"]], [["p"]]]) == pytest.approx(10 * math.exp(-1 / 72) * 0.5 / 4 / 2)


def test_cider_of_words_that_all_texts_share_is_nothing() -> None:
    assert cider([["a"], ["a"]], [[["a"]], [["a"]]]) == 0.0
    assert score("cider", ["one two three four"], [["one two three four"]]) == 0.0


def test_ter_by_hand() -> None:
    # Moving "c d" to the front is one edit, though four words differ in place.
    assert edits_between(["a", "b", "c", "d"], ["c", "d", "a", "b"]) == 1
    # The example of Snover et al. 2006: THIS WEEK moves, SAUDI and ARABIA replace two words, AMERICAN comes in: 4 edits of 13 words.
    hypothesis = ["THIS", "WEEK", "THE", "SAUDIS", "denied", "information", "published", "in", "the", "new", "york", "times"]
    reference = ["SAUDI", "ARABIA", "denied", "THIS", "WEEK", "information", "published", "in", "the", "AMERICAN", "new", "york", "times"]
    assert corpus_ter([hypothesis], [[reference]]) == pytest.approx(4 / 13)


def test_ter_of_a_corpus_and_of_its_texts() -> None:
    hypotheses = [["a", "b"], ["x"]]
    references = [[["a", "b", "c", "d"], ["a"]], [["x"]]]
    # Corpus: the fewest edits are 1 (from "a"), over the mean length 2.5; 0 over 1. Per text: 2/4 beats 1/1.
    assert corpus_ter(hypotheses, references) == pytest.approx(1 / 3.5)
    assert mean_ter(hypotheses, references) == pytest.approx(0.5 / 2)
    assert corpus_ter([["a"]], [[[]]]) == mean_ter([["a"]], [[[]]]) == 1.0
    assert corpus_ter([[]], [[[]]]) == mean_ter([[]], [[[]]]) == 0.0


def test_chrf_by_hand() -> None:
    # "ab" against "ac": characters 1/2 of 1-grams, 0/1 of 2-grams, 0/1 of words; orders that neither text has are left out.
    # P = R = (1/2 + 0 + 0) / 3, so F is the same for any beta.
    assert score("chrf++", ["ab"], [["ac"]]) == pytest.approx(100 / 6)


@pytest.mark.parametrize("profile", PROFILES)
def test_equal_texts_get_the_best_scores(profile: str) -> None:
    texts = ["The Eagle is a cheap pub.", "Blue Spice, near the river, serves Chinese food.", "Café Søren costs £20-25: très bon!"]
    scores = score_texts(texts, [[text, "something else"] for text in texts], profile=profile)
    assert list(scores) == NAMES
    assert {name: scores[name] for name in ("bleu", "rouge_l", "chrf++")} == pytest.approx({"bleu": 100, "rouge_l": 100, "chrf++": 100})
    assert scores["ter"] == 0.0 if PROFILES[profile].ter_per_text else scores["ter"] >= 0.0
    assert scores["meteor_exact_stem"] > 99
    single = score_texts(texts, [[text] for text in texts], profile=profile)
    assert single["cider"] == pytest.approx(10.0)
    assert single["ter"] == 0.0


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("hypothesis", ["", " ", ".", "zebra"])
def test_texts_that_share_nothing_get_the_worst_scores(profile: str, hypothesis: str) -> None:
    # One word against three: three edits of three words. 0 elsewhere; BLEU's smoothing finds no match to smooth.
    assert score_texts([hypothesis], [["red apple tree"]], profile=profile) == {
        "bleu": 0.0,
        "nist": 0.0,
        "meteor_exact_stem": 0.0,
        "rouge_l": 0.0,
        "cider": 0.0,
        "ter": 100.0,
        "chrf++": pytest.approx(score("chrf++", [hypothesis], [["red apple tree"]], profile)),
    }
    assert score("chrf++", [hypothesis], [["red apple tree"]], profile) < 10  # zebra shares e, r, a


@pytest.mark.parametrize("profile", PROFILES)
def test_an_empty_reference_beside_others_says_nothing(profile: str) -> None:
    hypotheses = ["reserved has 1 channel", "a b"]
    alone = score_texts(hypotheses, [["reserved has one channel"], ["a b c"]], profile=profile)
    assert score_texts(hypotheses, [["reserved has one channel", ""], ["  ", "a b c"]], profile=profile) == alone


def test_case_counts_in_plain_only() -> None:
    for profile, same in (("plain", False), ("e2e", True), ("webnlg", True), ("dart", True)):
        assert (score("bleu", ["THE CAT SAT DOWN"], [["the cat sat down"]], profile) > 99) is same
        assert (score("ter", ["THE CAT SAT DOWN"], [["the cat sat down"]], profile) == 0) is same


def test_webnlg_and_dart_keep_six_references() -> None:
    references = [[*"abcdef", "the seventh one"]]
    for profile, rate in (("webnlg", 100.0 * 3), ("dart", 100.0 * 3), ("plain", 0.0)):
        assert score("ter", ["the seventh one"], references, profile) == rate


def test_words_of_each_rule() -> None:
    text = "Jo's \"Pub\" costs £20-25 (cheap). It isn't old-fashioned."
    assert split_punctuation("x_y-z, é!") == "x_y - z , é !"
    assert " ".join(word_rule("mteval")(text)) == "Jo's \" Pub \" costs £20 - 25 ( cheap ) . It isn't old-fashioned ."
    assert " ".join(word_rule("caption")(text)) == "jo 's pub costs £ 20-25 cheap it is n't old-fashioned"
    assert word_rule("treebank")("the pub .") == ["the", "pub", "."]


def test_categories_are_scored_as_if_alone() -> None:
    hypotheses, references = ["a b c d", "e f g h", "a b x y"], [["a b c d"], ["e f g z"], ["a b c d"]]
    scores = score_texts(hypotheses, references, profile="webnlg", categories=["seen", "unseen", "seen"])
    alone = score_texts([hypotheses[0], hypotheses[2]], [references[0], references[2]], profile="webnlg")
    assert {name: scores[f"{name}_seen"] for name in NAMES} == alone
    assert {name: scores[name] for name in NAMES} == score_texts(hypotheses, references, profile="webnlg")
    assert list(scores) == NAMES + [f"{name}_seen" for name in NAMES] + [f"{name}_unseen" for name in NAMES]


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 hypotheses, but references for 2; each"),
        ([], [], "there are no hypotheses"),
        ("a", [["a"]], "hypotheses or references are one text"),
        (["a"], ["a"], "the references of hypothesis 1 are one text; they must be a list"),
        (["a", "b"], [["a"], []], "hypothesis 2 has no reference that is not empty"),
        (["a"], [["", " "]], "hypothesis 1 has no reference that is not empty"),
        ([None], [["a"]], "hypothesis 1 is None, not a text"),
        (["a"], [[3]], "a reference of hypothesis 1 is no text"),
    ],
)
def test_what_cannot_be_scored(hypotheses: Sequence[str], references: Sequence[Sequence[str]], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        score_texts(hypotheses, references)


def test_other_errors() -> None:
    with pytest.raises(ConfigError, match=r"profile is 'E2E'; it must be one of plain, e2e, webnlg, dart"):
        score_texts(["a"], [["a"]], profile="E2E")
    with pytest.raises(DataError, match=r"1 categories for 2 hypotheses"):
        score_texts(["a", "b"], [["a"], ["b"]], categories=["seen"])


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generation._PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(ConfigError, match=r"need no-such-package, not installed; pip install 'adakron\[nlg\]'"):
        score_texts(["a"], [["a"]])
    with pytest.raises(ConfigError, match="no-such-package"):
        GenerationScore("e2e")


def test_the_evaluate_module_returns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    hypotheses, references = ["Café a b", ""], [["café a b c", "x"], ["y"]]
    metric = GenerationScore("e2e")
    assert metric.compute(predictions=hypotheses, references=references) == score_texts(hypotheses, references, profile="e2e")
    assert list(tmp_path.iterdir()) == []
