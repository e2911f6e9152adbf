"""The scores that well-kept libraries compute: BLEU and chrF++ by sacrebleu, the longest common subsequence of ROUGE-L by rouge-score."""

from collections.abc import Callable
from typing import Any

from adakron.scores.corpus import Corpus, Segment


def bleu(corpus: Corpus) -> float:
    """Corpus BLEU (Papineni et al. 2002) of mteval's tokens with the closest reference length, in percent."""
    from sacrebleu.metrics.bleu import BLEU

    hypotheses = [" ".join(segment.tokens) for segment in corpus.segments]
    streams = _streams(corpus, lambda segment: [" ".join(tokens) for tokens in segment.reference_tokens])
    scorer = BLEU(tokenize="none", smooth_method="exp" if corpus.profile.smooth_bleu else "none", force=True)
    return float(scorer.corpus_score(hypotheses, streams).score)


def chrf(corpus: Corpus) -> float:
    """Corpus chrF++ (Popovic 2017): character 1- to 6-grams, word 1- and 2-grams, beta 2, of the best reference; in percent."""
    from sacrebleu.metrics.chrf import CHRF

    hypotheses = [segment.hypothesis for segment in corpus.segments]
    streams = _streams(corpus, lambda segment: segment.references)
    return float(CHRF(word_order=2).corpus_score(hypotheses, streams).score)


def rouge_l(corpus: Corpus) -> float:
    """The mean over texts of ROUGE-L (Lin 2004), the longest common subsequence of words; in percent. See `Profile.rouge_beta`."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_AlreadyWords())
    beta = corpus.profile.rouge_beta
    total = 0.0
    for segment in corpus.segments:
        scores = [scorer.score(words, segment.words)["rougeL"] for words in segment.reference_words]
        if beta is None:
            total += max(score.fmeasure for score in scores)
            continue
        precision, recall = max(score.precision for score in scores), max(score.recall for score in scores)
        if precision and recall:
            total += (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return 100.0 * total / len(corpus.segments)


def _streams(corpus: Corpus, texts_of: Callable[[Segment], list[str]]) -> list[list[Any]]:
    """References as sacrebleu takes them: lists of one per hypothesis, None where a hypothesis has no more."""
    groups = [texts_of(segment) for segment in corpus.segments]
    return [[group[index] if index < len(group) else None for group in groups] for index in range(max(map(len, groups)))]


class _AlreadyWords:
    """A tokenizer for words that are cut already."""

    def tokenize(self, words: list[str]) -> list[str]:
        return words
