"""Our scores against other implementations of them, on human texts: the E2E test set's first texts against their others."""

import json
from collections import defaultdict

import pytest
from nltk.translate.bleu_score import corpus_bleu
from nltk.translate.nist_score import corpus_nist
from sacrebleu.metrics.lib_ter import translation_edit_rate
from sacrebleu.metrics.ter import TER

from adakron.scores import score_texts
from adakron.scores.cider import cider
from adakron.scores.corpus import Corpus
from adakron.scores.libraries import bleu, rouge_l
from adakron.scores.nist import nist
from adakron.scores.profiles import find_profile
from adakron.scores.ter import corpus_ter, edits_between, mean_ter
from tests.helpers.shared import shared_data

OTHERS = "pip install --no-deps --target DIR pycocoevalcap pyter3, then PYTHONPATH=DIR"


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    groups: dict[str, list[str]] = defaultdict(list)
    for line in (shared_data("e2e_nlg") / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        groups[row["meaning_representation"]].append(row["human_reference"])
    several = [texts for texts in groups.values() if len(texts) > 2][:60]
    return Corpus([texts[0] for texts in several], [texts[1:6] for texts in several], find_profile("e2e"))


def test_bleu_is_that_of_nltk(corpus: Corpus) -> None:
    references = [segment.reference_tokens for segment in corpus.segments]
    hypotheses = [segment.tokens for segment in corpus.segments]
    assert bleu(corpus) == pytest.approx(100 * corpus_bleu(references, hypotheses), rel=1e-9)
    assert 20 < bleu(corpus) < 90


def test_nist_is_that_of_nltk_where_there_is_one_reference(corpus: Corpus) -> None:
    hypotheses = [segment.tokens for segment in corpus.segments]
    references = [segment.reference_tokens[:1] for segment in corpus.segments]
    assert nist(hypotheses, references) == pytest.approx(corpus_nist(references, hypotheses), rel=1e-9)


def test_edits_are_those_of_sacrebleu(corpus: Corpus) -> None:
    pairs = [(segment.words, words) for segment in corpus.segments[:25] for words in segment.reference_words[:2]]
    assert [edits_between(*pair) for pair in pairs] == [translation_edit_rate(*pair)[0] for pair in pairs]


def test_ter_is_that_of_sacrebleu(corpus: Corpus) -> None:
    few = corpus.segments[:8]
    hypotheses, references = [" ".join(s.words) for s in few], [[" ".join(words) for words in s.reference_words] for s in few]
    streams = [[group[index] if index < len(group) else None for group in references] for index in range(5)]
    ours = corpus_ter([s.words for s in few], [s.reference_words for s in few])
    assert 100 * ours == pytest.approx(TER().corpus_score(hypotheses, streams).score)
    lowest = [min(TER().sentence_score(h, [r]).score for r in group) for h, group in zip(hypotheses, references, strict=True)]
    assert 100 * mean_ter([s.words for s in few], [s.reference_words for s in few]) == pytest.approx(sum(lowest) / len(lowest))


def test_rouge_and_cider_are_those_of_the_caption_evaluation(corpus: Corpus) -> None:
    captions = pytest.importorskip("pycocoevalcap.cider.cider", reason=f"needs the package pycocoevalcap ({OTHERS})")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge", reason=f"needs the package pycocoevalcap ({OTHERS})")
    gts = {index: [" ".join(words) for words in segment.reference_words] for index, segment in enumerate(corpus.segments)}
    res = {index: [" ".join(segment.words)] for index, segment in enumerate(corpus.segments)}
    assert rouge_l(corpus) == pytest.approx(100 * rouge.Rouge().compute_score(gts, res)[0], rel=1e-9)
    ours = cider([s.words for s in corpus.segments], [s.reference_words for s in corpus.segments])
    assert ours == pytest.approx(captions.Cider().compute_score(gts, res)[0], rel=1e-9)


def test_ter_is_near_that_of_pyter(corpus: Corpus) -> None:
    pyter = pytest.importorskip("pyter", reason=f"needs the package pyter3 ({OTHERS})")
    few = corpus.segments[:20]
    theirs = sum(min(pyter.ter(s.words, words) for words in s.reference_words) for s in few) / len(few)
    # Its search for moves has other rules: docs/scores.md.
    assert mean_ter([s.words for s in few], [s.reference_words for s in few]) == pytest.approx(theirs, abs=0.02)


def test_dart_with_its_empty_reference_is_scored() -> None:
    rows = [json.loads(line)["annotations"]["text"] for line in (shared_data("dart") / "test.jsonl").read_text().splitlines()]
    where = next(index for index, texts in enumerate(rows) if "" in texts)
    near = [texts for texts in rows[where - 20 : where + 20] if len(texts) > 1]
    assert any("" in texts for texts in near)
    scores = score_texts([texts[0] for texts in near], near, profile="dart")
    assert {name: scores[name] for name in ("bleu", "ter")} == pytest.approx({"bleu": 100, "ter": 0})
