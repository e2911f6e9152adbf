"""The scores that well-kept libraries compute: BLEU, TER and chrF++ by sacrebleu, the longest common subsequence by rouge-score."""

from typing import Any

from adakron.scores.corpus import Corpus, Segment


def bleu(corpus: Corpus) -> float:
    """Corpus BLEU (Papineni et al. 2002) of mteval's tokens with the closest reference length, in percent."""
    from sacrebleu.metrics.bleu import BLEU

    hypotheses = [" ".join(segment.tokens) for segment in corpus.segments]
    most = max(len(segment.references) for segment in corpus.segments)
    streams = [
        [" ".join(segment.reference_tokens[index]) if index < len(segment.references) else None for segment in corpus.segments]
        for index in range(most)
    ]
    scorer = BLEU(tokenize="none", smooth_method="exp" if corpus.profile.smooth_bleu else "none", force=True)
    return float(scorer.corpus_score(hypotheses, streams).score)


def chrf(corpus: Corpus) -> float:
    """Corpus chrF++ (Popovic 2017): character 1- to 6-grams, word 1- and 2-grams, beta 2, of the best reference; in percent."""
    from sacrebleu.metrics.chrf import CHRF

    hypotheses, streams = corpus.texts
    return float(CHRF(word_order=2).corpus_score(hypotheses, streams).score)


def ter(corpus: Corpus) -> float:
    """Translation edit rate (Snover et al. 2006) in percent of the reference's words; 0 is best, above 100 is possible."""
    from sacrebleu.metrics.ter import TER

    scorer = TER(case_sensitive=True)  # the words are as the profile wants them
    if corpus.profile.ter_per_text:
        return sum(_lowest_rate(scorer, segment) for segment in corpus.segments) / len(corpus.segments)
    edits, length = 0.0, 0.0
    for segment in corpus.segments:
        score = scorer.sentence_score(" ".join(segment.words), [" ".join(words) for words in segment.reference_words])
        edits, length = edits + score.num_edits, length + score.ref_length
    if length == 0:
        return 100.0 if edits else 0.0
    return 100.0 * edits / length


def _lowest_rate(scorer: Any, segment: Segment) -> float:
    hypothesis = " ".join(segment.words)
    return min(float(scorer.sentence_score(hypothesis, [" ".join(words)]).score) for words in segment.reference_words)


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


class _AlreadyWords:
    """A tokenizer for words that are cut already."""

    def tokenize(self, words: list[str]) -> list[str]:
        return words
